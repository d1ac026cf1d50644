"""Tokens mixed among data-parallel ranks before they are routed: an exchange that is taken back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nxdt_nemo.testing.moe_layer import BATCH, HIDDEN, TOKENS, Case, Fault, run_all, worst
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import RankError
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout

pytestmark = pytest.mark.ranks

TWO, FOUR, EXPERTS_APART = Layout(dp=2), Layout(dp=4), Layout(dp=2, ep=2)
MIXED = {"token_shuffle_group_size": 2}
ROUTER = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 1e-3}
Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def ours(gloo: Gloo) -> Run:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    return lambda place, function, *args: gloo(place.world, function, *args, init=ACTIVE, env=ACTIVE_ENV)


def layers(ours: Run, place: Layout, **cases: Case) -> list[dict[str, Any]]:
    return ours(place, run_all, cases, place, "ours")


# --- the exchange -------------------------------------------------------------------------------------------------


def exchanged(place: Layout, size: int) -> tuple[Any, Any, Any, list[int]]:
    """Tokens that say whose they are: mixed, and put back; the gradient of a weighted sum; the group's ranks."""
    import torch
    import torch.distributed as dist

    from nxdt_nemo.megatron.transformer.moe.token_shuffle import shuffle, shuffle_group, unshuffle
    from nxdt_nemo.testing.moe_layer import config_of, in_layout

    config = config_of(Case(marks={"token_shuffle_group_size": size}), place, "ours")
    with in_layout(place, "ours"):
        group = shuffle_group(config)
        assert group is not None and group is shuffle_group(config)
        torch.manual_seed(dist.get_rank())
        first = dist.get_rank() * TOKENS * BATCH
        x = torch.arange(first, first + TOKENS * BATCH).double().view(TOKENS, BATCH, 1).expand(-1, -1, HIDDEN)
        x = x.contiguous().requires_grad_()
        mixed, order = shuffle(x, group)
        (mixed.square() / 2).sum().backward()
        return mixed.detach()[..., 0], unshuffle(mixed, order, group).detach()[..., 0], x.grad[..., 0], [*group.ranks]


@pytest.mark.parametrize(
    ("place", "size"),
    [
        (TWO, 2),
        pytest.param(FOUR, 4, marks=pytest.mark.slow),
        pytest.param(FOUR, 2, marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, sp=True, dp=2), 2, marks=pytest.mark.slow),
    ],
)
def test_a_rank_gets_an_equal_part_of_each_and_all_come_back(ours, place, size):
    found, tokens = ours(place, exchanged, place, size), TOKENS * BATCH
    for rank, (mixed, back, gradient, ranks) in enumerate(found):
        own = [float(number) for number in range(rank * tokens, (rank + 1) * tokens)]
        assert back.flatten().tolist() == own == gradient.flatten().tolist()
        owners = [int(number) // tokens for number in mixed.flatten().tolist()]
        assert {owner: owners.count(owner) for owner in ranks} == dict.fromkeys(ranks, tokens // size)
        places = [int(number) % tokens for number in mixed.flatten().tolist()]
        assert places[: tokens // size] != sorted(places[: tokens // size])
    everything = sorted(number for mixed, *_ in found for number in mixed.flatten().tolist())
    assert everything == list(range(len(found) * tokens))


# --- a layer of experts -------------------------------------------------------------------------------------------


def totals(found: list[dict[str, Any]], case: str, place: Layout) -> dict[str, Any]:
    """What does not depend on where a token was computed: outputs and input gradients rank by rank, and the weights'
    gradients summed over the ranks that hold a copy."""
    result = {}
    for rank, cases in enumerate(found):
        for name, value in cases[case].items():
            if name in ("output", "input gradient"):
                result[f"{name} of rank {rank}"] = value
            elif name.endswith("weight"):
                result[name] = result.get(name, 0.0) + value.double()
    assert len(result) > 2 * place.world
    return result


@pytest.mark.parametrize("place", [TWO, EXPERTS_APART], ids=str)
@pytest.mark.parametrize("own", [{}, {"moe_grouped_gemm": True}, {"recompute_granularity": "selective"}], ids=str)
def test_where_nothing_is_dropped_it_changes_nothing(ours, place, own):
    if own.get("recompute_granularity"):
        own = {**own, "recompute_modules": ["moe"]}
    plain = Case(ROUTER)
    found = layers(ours, place, plain=plain, mixed=plain.by(marks=MIXED, **own))
    assert worst(totals(found, "mixed", place), totals(found, "plain", place))[0] < 2e-6
    assert any(not cases["mixed"]["routed"].equal(cases["plain"]["routed"]) for cases in found)


@pytest.mark.parametrize("fault", ["tokens not put back"])
def test_a_mistake_would_be_seen(ours, fault: Fault):
    plain = Case(ROUTER)
    found = layers(ours, TWO, plain=plain, mixed=plain.by(marks=MIXED, fault=fault))
    assert worst(totals(found, "mixed", TWO), totals(found, "plain", TWO))[0] > 0.1


def test_not_in_training_it_does_nothing(ours):
    plain = Case(ROUTER, training=False)
    found = layers(ours, TWO, plain=plain, mixed=plain.by(marks=MIXED))
    assert [worst(cases["mixed"], cases["plain"])[0] for cases in found] == [0.0, 0.0]


def test_with_a_capacity_less_is_dropped(ours):
    """All 24 tokens of a rank want the same two experts, which have room for 12 each: half of them come to nothing."""
    tight = Case({**ROUTER, "moe_expert_capacity_factor": 1.0}, alike=True)
    found = layers(ours, TWO, plain=tight, mixed=tight.by(marks=MIXED))
    kept = {name: sum(int(cases[name]["routed"].sum()) for cases in found) for name in ("plain", "mixed")}
    assert kept == {"plain": 2 * 24, "mixed": 2 * 48}
    assert all(bool(cases["mixed"]["output"].any()) for cases in found)


@pytest.mark.parametrize(
    ("marks", "fields", "text"),
    [
        ({"token_shuffle_group_size": 3}, {}, "token_shuffle_group_size: 3 does not divide the 2 data-parallel ranks"),
        ({"token_shuffle_group_size": 0}, {}, "token_shuffle_group_size: 0 does not divide"),
        (MIXED, {"moe_router_load_balancing_type": "seq_aux_loss"}, "2 mixes sequences"),
    ],
)
def test_what_does_not_go_together_is_one_line(ours, marks, fields, text):
    with pytest.raises(RankError) as error:
        layers(ours, TWO, case=Case(ROUTER | fields, marks=marks))
    assert error.value.kind == "ConfigError" and text in str(error.value)


def odd(place: Layout) -> None:
    import torch

    from nxdt_nemo.megatron.transformer.moe.token_shuffle import shuffle, shuffle_group
    from nxdt_nemo.testing.moe_layer import config_of, in_layout

    with in_layout(place, "ours"):
        group = shuffle_group(config_of(Case(marks=MIXED), place, "ours"))
        assert group is not None
        shuffle(torch.zeros(3, 1, 4), group)


def test_tokens_that_do_not_come_out_even_are_an_error(ours):
    with pytest.raises(RankError) as error:
        ours(TWO, odd, TWO)
    assert error.value.kind == "ConfigError" and "2 does not divide the 3 tokens of a rank" in str(error.value)
