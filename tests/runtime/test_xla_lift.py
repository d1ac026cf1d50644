"""All ranks in one process: each collective against plain torch on the ranks' tensors, and steps that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nxdt_nemo.runtime.gaps import PremulSum
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.ops import Ops
from nxdt_nemo.testing.lifted import lifted_env
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Layout

pytestmark = pytest.mark.ranks

WORLD = 4
MESHES = {"neighbours": [[0, 1], [2, 3]], "strided": [[0, 2], [1, 3]], "world": [[0, 1, 2, 3]]}
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)

Ours = Callable[[Ops, torch.Tensor, Group], torch.Tensor]
Plain = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def alike(reduce: Callable[[torch.Tensor], torch.Tensor]) -> Plain:
    """Each rank has what `reduce` makes of all, stacked."""
    return lambda xs: [reduce(torch.stack(xs)).to(xs[0].dtype)] * len(xs)


def mean(xs: torch.Tensor) -> torch.Tensor:
    return xs.mean(0) if xs.is_floating_point() else xs.sum(0).div(len(xs), rounding_mode="trunc")


def scattered(dim: int) -> Plain:
    return lambda xs: list(torch.stack(xs).sum(0).to(xs[0].dtype).chunk(len(xs), dim))


def swapped(xs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat([x.chunk(len(xs))[rank] for x in xs]) for rank in range(len(xs))]


def passed_on(xs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(xs[0]), *xs[:-1]]


MOVING: dict[str, tuple[Ours, Plain]] = {
    "broadcast": (lambda ops, x, group: ops.broadcast_(x.clone(), 1, group), lambda xs: [xs[1]] * len(xs)),
    "all_gather 0": (lambda ops, x, group: ops.all_gather(x, 0, group), lambda xs: [torch.cat(xs)] * len(xs)),
    "all_gather -1": (lambda ops, x, group: ops.all_gather(x, -1, group), lambda xs: [torch.cat(xs, -1)] * len(xs)),
    "all_to_all": (lambda ops, x, group: ops.all_to_all(x, group, None, None), swapped),
    "permute on": (
        lambda ops, x, group: ops.permute(x, [(rank, rank + 1) for rank in range(group.size - 1)], group),
        passed_on,
    ),
    "permute around": (
        lambda ops, x, group: ops.permute(x, [(rank, (rank + 1) % group.size) for rank in range(group.size)], group),
        lambda xs: [xs[-1], *xs[:-1]],
    ),
    "shard 0": (
        lambda ops, x, group: ops.shard(x, 0, group),
        lambda xs: [x.chunk(len(xs))[rank] for rank, x in enumerate(xs)],
    ),
    "shard -1": (
        lambda ops, x, group: ops.shard(x, -1, group),
        lambda xs: [x.chunk(len(xs), -1)[rank] for rank, x in enumerate(xs)],
    ),
}
ADDING: dict[str, tuple[Ours, Plain]] = {
    "sum": (lambda ops, x, group: ops.all_reduce_(x.clone(), group, "sum"), alike(lambda xs: xs.sum(0))),
    "max": (lambda ops, x, group: ops.all_reduce_(x.clone(), group, "max"), alike(lambda xs: xs.amax(0))),
    "min": (lambda ops, x, group: ops.all_reduce_(x.clone(), group, "min"), alike(lambda xs: xs.amin(0))),
    "reduce_scatter 0": (lambda ops, x, group: ops.reduce_scatter(x, 0, group), scattered(0)),
    "reduce_scatter -1": (lambda ops, x, group: ops.reduce_scatter(x, -1, group), scattered(-1)),
}
AVERAGING: dict[str, tuple[Ours, Plain]] = {
    "avg": (lambda ops, x, group: ops.all_reduce_(x.clone(), group, "avg"), alike(mean)),
}
SCALING: dict[str, tuple[Ours, Plain]] = {
    "halves": (
        lambda ops, x, group: ops.all_reduce_(x.clone(), group, PremulSum(0.5)),
        alike(lambda xs: (xs * 0.5).sum(0)),
    ),
}


def cases(dtype: torch.dtype) -> dict[str, tuple[Ours, Plain]]:
    """What a dtype has: a sum of booleans is "any", and they have no mean; whole numbers have no halves."""
    more = {torch.bool: {}, torch.int64: AVERAGING}.get(dtype, AVERAGING | SCALING)
    return MOVING | ADDING | more


def given(dtype: torch.dtype) -> list[torch.Tensor]:
    """Each rank's [4, 8]: whole numbers, whose sums and means are exact in bf16."""
    numbers = torch.randint(-8, 9, (WORLD, 4, 8), generator=torch.Generator().manual_seed(7))
    return list((numbers > 0) if dtype is torch.bool else numbers.to(dtype))


def plainly(name: str, dtype: torch.dtype, mesh: list[list[int]]) -> list[torch.Tensor]:
    """Each rank's result, by torch alone."""
    inputs, found = given(dtype), {}
    for ranks in mesh:
        found |= dict(zip(ranks, cases(dtype)[name][1]([inputs[rank] for rank in ranks]), strict=True))
    return [found[rank] for rank in range(WORLD)]


@contextmanager
def lifted() -> Iterator[tuple[Any, Any]]:
    """The lane and its lift over the world."""
    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.xla.lift import Lift
    from nxdt_nemo.runtime.xla.world import pretend

    lane: Any = current()
    lift = Lift(WORLD)
    with pretend(lane, 0, WORLD, lift):
        yield lane, lift


def collectives() -> dict[tuple[str, torch.dtype, str], torch.Tensor]:
    """[W, ...] of each, by mesh, dtype and name: one graph."""
    with lifted() as (lane, lift):
        groups = {name: lane.groups(mesh, name) for name, mesh in MESHES.items()}
        keys = [(mesh, dtype, name) for mesh in MESHES for dtype in DTYPES for name in cases(dtype)]

        def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
            mine = dict(zip(DTYPES, inputs, strict=True))
            return [cases(dtype)[name][0](lane.ops, mine[dtype], groups[mesh]) for mesh, dtype, name in keys]

        found = lift.step(lambda: iter(()), [lift.stack(given(dtype)) for dtype in DTYPES], run)
        return dict(zip(keys, found, strict=True))


@pytest.fixture(scope="module")
def alone(with_torch_xla: None) -> Iterator[Callable[..., Any]]:
    """alone(function): its result, from a process of WORLD devices."""
    with RankPool(1, env=lifted_env(Layout(dp=WORLD)), init=ACTIVE, group=False, timeout=300) as pool:
        yield lambda function: pool.run(function)[0]


def test_collectives_are_those_of_plain_torch(alone: Callable[..., Any]) -> None:
    found = alone(collectives)
    off = [
        key
        for key, whole in found.items()
        if whole.dtype != key[1] or whole.tolist() != [x.tolist() for x in plainly(key[2], key[1], MESHES[key[0]])]
    ]
    assert not off
    # The data tell groups apart: with others' members or places, nothing would be equal.
    for dtype in DTYPES:
        for name in cases(dtype):
            there = [x.tolist() for x in plainly(name, dtype, MESHES["strided"])]
            assert found["neighbours", dtype, name].tolist() != there, (dtype, name)


def drawing(inside: bool) -> Callable[..., list[torch.Tensor]]:
    """A step with dropout, in a random stream of its own or not."""
    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.rng import RngStreams

    streams = RngStreams(current())
    streams.add("model-parallel-rng", 5)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        if not inside:
            return [torch.nn.functional.dropout(x, 0.5)]
        with streams.fork("model-parallel-rng"):
            return [torch.nn.functional.dropout(x, 0.5)]

    return run


def draws() -> list[str]:
    """What steps that draw are told, and one that does not."""
    from nxdt_nemo.errors import LaneError

    said = []
    with lifted() as (_, lift):
        inputs = [lift.stack(given(torch.float32))]
        for run in (drawing(inside=False), drawing(inside=True), lambda x: [x + 1]):
            try:
                lift.step(lambda: iter(()), inputs, run)
                said.append("")
            except LaneError as error:
                said.append(str(error))
    return said


def test_a_step_that_draws_is_refused(alone: Callable[..., Any]) -> None:
    outside, inside, neither = alone(draws)
    said = (
        "Lift.step: the step draws random numbers, and all ranks of one process would draw the same ones; "
        "set hidden_dropout and attention_dropout to 0"
    )
    assert outside == inside == said
    assert neither == ""


def reads() -> list[dict[str, int]]:
    """What is counted within a step that asks for a number of the device, and within one that does not."""
    from nxdt_nemo.runtime.xla.metrics import counters, since

    found = []
    with lifted() as (_, lift):
        inputs = [lift.stack(given(torch.float32))]
        for number in (lambda x: torch.ones(1, device=x.device).sum().item(), lambda x: 1.0):

            def run(x: torch.Tensor, number: Callable[[torch.Tensor], float] = number) -> list[torch.Tensor]:
                began = counters()
                made = [x * number(x)]
                found.append(since(began))
                return made

            lift.step(lambda: iter(()), inputs, run)
    return found


def test_a_reading_within_a_step_is_counted(alone: Callable[..., Any]) -> None:
    assert alone(reads) == [{"compiled": 1, "read": 1, "aten::_local_scalar_dense": 1}, {}]
