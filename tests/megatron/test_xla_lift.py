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


def means() -> list[list[float]]:
    """Each rank's result of a mean over the world, of whole numbers and of others."""
    import torch

    from nxdt_nemo.runtime import collectives, current
    from nxdt_nemo.runtime.xla.lift import Lift
    from nxdt_nemo.runtime.xla.world import pretend

    lane: Any = current()
    lift = Lift(4)
    with pretend(lane, 0, 4, lift):
        group = lane.groups([[0, 1], [2, 3]], "pairs")
        inputs = [lift.stack([torch.tensor([rank * rank]).to(kind) for rank in range(4)]) for kind in (int, float)]
        found = lift.step(
            lambda: iter(()), inputs, lambda *mine: [collectives.all_reduce_(one.clone(), group, "avg") for one in mine]
        )
        return [one.flatten().tolist() for one in found]


def test_means_in_the_graph(with_torch_xla: None) -> None:
    with RankPool(1, env=lifted_env(layout("dp4+zero")), init=ACTIVE, group=False, timeout=300) as pool:
        [found] = pool.run(means)
    assert found == [[0, 0, 6, 6], [0.5, 0.5, 6.5, 6.5]]


@pytest.mark.slow
def test_thirty_two_ranks_run(parity: Parity, lifted: Callable[..., Lifted]) -> None:
    """TP 8 with sequence parallelism x DP 4, ZeRO-1: beside one rank of the cpu lane, which has no room for 32."""
    recipe = Recipe.of("gpt", layers=1)
    found = lifted(recipe, parity.weights(recipe), layout("tp8spdp4+zero"))
    expected, _ = parity.ours(recipe, Layout())
    losses = [sum(step) / len(step) for step in found.losses]
    assert len(found.losses[0]) == 32
    assert relative(losses, expected.losses[:STEPS]) <= 1e-5
    assert relative([step[0] for step in found.grad_norms], expected.grad_norms[:STEPS]) <= 1e-5
