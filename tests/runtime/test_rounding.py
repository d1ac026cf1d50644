"""Stochastic rounding: always to a neighbour, right on average, the same for the same seed and step."""

from __future__ import annotations

import math

import pytest
import torch

from nxdt_nemo.runtime.rounding import SEED, SWITCH, copy_rounded_, stochastic

N = 200_000


def numbers() -> torch.Tensor:
    """Both signs, many exponents, no two alike."""
    torch.manual_seed(1)
    return torch.randn(N) * 2.0 ** torch.randint(-20, 20, (N,))


def neighbours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers next to x, towards zero and away from it, as float32."""
    towards = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return towards, ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)


def up(x: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Whether each was rounded away from zero."""
    towards, away = neighbours(x)
    found = stochastic(x, seed, step).float()
    assert bool(((found == towards) | (found == away)).all())
    return found != towards


def too_far(went_up: torch.Tensor, probability: torch.Tensor) -> float:
    """Standard deviations between how many went up and how many should have."""
    variance = float((probability * (1 - probability)).double().sum())
    return abs(float(went_up.double().sum() - probability.double().sum())) / math.sqrt(variance)


def fraction(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & 0xFFFF) / 0x10000


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (0, 2), (1, 1), (2**31 + 5, 10**6)])
def test_it_is_right_on_average(seed, step):
    """Over numbers, in each of sixteen classes of what is dropped. Five deviations: one run in a million is wrong."""
    x = numbers()
    went, wanted = up(x, seed, step), fraction(x)
    for low in range(16):
        these = (wanted >= low / 16) & (wanted < (low + 1) / 16)
        assert too_far(went[these], wanted[these]) < 5.0
    assert too_far(wanted >= 0.5, wanted) < 5.0  # nearest is right on average too, but not in a class:
    these = wanted < 1 / 16
    assert too_far(wanted[these] >= 0.5, wanted[these]) > 5.0


def test_it_is_right_for_one_number():
    """Over steps, and over seeds."""
    x = torch.tensor([1.0 + 0.3 / 128, -3.0 - 0.9 / 64, 1e-30, 1e30])
    for keys in ([(0, step) for step in range(1500)], [(seed, 1) for seed in range(1500)]):
        went = torch.stack([up(x, *key) for key in keys])
        for place, wanted in enumerate(fraction(x)):
            assert too_far(went[:, place], wanted.expand(len(keys))) < 5.0


def test_two_steps_and_two_seeds_have_nothing_to_do_with_each_other():
    x = numbers()
    first, wanted = up(x, 0, 1), fraction(x)
    for other in (up(x, 0, 2), up(x, 1, 1), up(x, 1, 0)):
        assert too_far(first & other, wanted * wanted) < 5.0
    assert too_far(first & up(x, 0, 1), wanted * wanted) > 5.0  # the control


def test_the_same_key_rounds_alike_wherever_a_number_stands():
    x = numbers()
    assert torch.equal(stochastic(x, 3, 4), stochastic(x.flip(0), 3, 4).flip(0))
    assert torch.equal(stochastic(x, 3, 4)[7:1007], stochastic(x[7:1007], 3, 4))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_needs_no_rounding_stays(step):
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, 2.0**-126])
    assert torch.equal(stochastic(exact, 0, step).float(), exact)
    assert stochastic(torch.tensor([math.nan]), 0, step).isnan().all()
    tiny = torch.tensor([1e-44])  # below all bfloat16 numbers
    assert float(stochastic(tiny, 0, step)) in (
        0.0,
        float(torch.tensor([0x10000], dtype=torch.int32).view(torch.float32)),
    )


def test_only_where_it_is_asked_for(monkeypatch):
    x, half, full = numbers(), torch.empty(N, dtype=torch.bfloat16), torch.empty(N)
    for value, expected in {"": x.bfloat16(), "0": x.bfloat16(), "1": stochastic(x, 6, 9)}.items():
        monkeypatch.setenv(SWITCH, value)
        monkeypatch.setenv(SEED, "6")
        copy_rounded_(half, x, 9)
        assert torch.equal(half, expected)
        copy_rounded_(full, x, 9)
        assert torch.equal(full, x)
