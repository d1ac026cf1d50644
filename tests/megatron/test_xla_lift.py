"""All ranks of a layout in one process: one traced program on many devices, collectives inside the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nxdt_nemo.testing.lifted import Lifted, lifted_env
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.parity import Parity, relative
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Layout, Recipe, layout

pytestmark = pytest.mark.ranks
STEPS = 3


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def lifted(with_torch_xla: None) -> Callable[[Recipe, Any, Layout], Lifted]:
    """lifted(recipe, weights, layout): some steps of all ranks, in a process of its own."""

    def run(recipe: Recipe, weights: Any, layout: Layout) -> Lifted:
        with RankPool(1, env=lifted_env(layout), init=ACTIVE, group=False, timeout=900) as pool:
            [found] = pool.run("nxdt_nemo.testing.lifted:train", recipe, weights, layout, STEPS)
        return found  # type: ignore[no-any-return]

    return run


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("gpt", "tp2spdp2"),
        slow("gpt", "tp2"),
        slow("llama", "tp2sp"),
        slow("gpt", "dp4+zero"),
        slow("gpt", "tp4dp2"),
        slow("llama", "tp2spdp2+zero"),
    ],
)
def test_equals_the_cpu_lanes_ranks(parity: Parity, lifted: Callable[..., Lifted], family: Any, place: str) -> None:
    recipe = Recipe.of(family, layers=1 if place == "tp2spdp2" else 2)
    found = lifted(recipe, parity.weights(recipe), layout(place))
    expected, _ = parity.ours(recipe, layout(place))
    losses = [sum(step) / len(step) for step in found.losses]
    assert relative(losses, expected.losses[:STEPS]) <= 1e-6
    for norms in zip(*found.grad_norms, strict=True):
        assert relative([*norms], expected.grad_norms[:STEPS]) <= 1e-6
    assert not any(found.compiled[1:])  # the first step's graph is what the others run
    assert found.within == [{}] * STEPS  # and within it nothing is read, nor off XLA


@pytest.mark.slow
def test_thirty_two_ranks_run(parity: Parity, lifted: Callable[..., Lifted]) -> None:
    """TP 8 with sequence parallelism x DP 4, ZeRO-1: beside one rank of the cpu lane, which has no room for 32."""
    recipe = Recipe.of("gpt", layers=1)
    found = lifted(recipe, parity.weights(recipe), layout("tp8spdp4+zero"))
    expected, _ = parity.ours(recipe, Layout())
    losses = [sum(step) / len(step) for step in found.losses]
    assert len(found.losses[0]) == 32
    assert found.within == [{}] * STEPS
    assert relative(losses, expected.losses[:STEPS]) <= 1e-5
    assert relative([step[0] for step in found.grad_norms], expected.grad_norms[:STEPS]) <= 1e-5
