"""Stochastic rounding of a sharded optimizer's bfloat16 weights: resumed to the bit, alike on all ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, Part, assemble
from nxdt_nemo.testing.pool import RankError
from nxdt_nemo.testing.recipe import Layout, Recipe, layout
from nxdt_nemo.testing.weights import merge

pytestmark = pytest.mark.ranks

RECIPE = Recipe.of("gpt", layers=2, micro_batches=2, steps=4, dtype="bfloat16")


def train(seed: int | None, *arguments: Any) -> Part:
    """One rank's part of a run, rounded with a seed or to the nearest."""
    from nxdt_nemo.runtime.rounding import SEED, SWITCH
    from nxdt_nemo.testing import ours

    variables = {} if seed is None else {SWITCH: "1", SEED: str(seed)}
    os.environ.update(variables)
    try:
        return ours.train(*arguments)
    finally:
        for name in variables:
            del os.environ[name]


@pytest.fixture
def leg(parity, gloo) -> Any:
    def run(seed: int | None, place: Layout, steps: range, resume: Path | None = None, save: Path | None = None) -> Any:
        arguments = (RECIPE, parity.weights(RECIPE), place, "", steps, resume, save)
        parts = gloo(place.world, train, seed, *arguments, init=ACTIVE, env=ACTIVE_ENV)
        assert merge([part.weights for part in parts])[1] == 0.0  # copies are alike
        return assemble(parts)[0]

    return run


SLOW = ("tp2+zero", "pp2dp2+zero")


@pytest.mark.parametrize("name", ["dp2+zero", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_resumed_to_the_bit(leg, tmp_path, name):
    place = layout(name)
    whole = leg(5, place, range(4))
    leg(5, place, range(2), save=tmp_path / "saved")
    rest = leg(5, place, range(2, 4), resume=tmp_path / "saved")
    assert (rest.losses, rest.grad_norms) == (whole.losses[2:], whole.grad_norms[2:])
    assert all(torch.equal(rest.weights[key], whole.weights[key]) for key in whole.weights)


def test_the_seed_counts(leg):
    place = layout("dp2+zero")
    first, again, other, nearest = (leg(seed, place, range(3)) for seed in (5, 5, 6, None))
    assert first.losses == again.losses
    assert first.losses[0] == other.losses[0] == nearest.losses[0]  # before the first step
    assert len({run.losses[2] for run in (first, other, nearest)}) == 3


def test_an_optimizer_that_does_not_round_says_so(leg):
    with pytest.raises(RankError, match="NEURON_RT_STOCHASTIC_ROUNDING_EN=1 is not emulated in megatron-core's unsha"):
        leg(5, layout("dp2"), range(1))
