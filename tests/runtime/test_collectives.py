"""Functional collectives against the unsharded computation, and against megatron-core's mappings.

Each rank's loss is a weighted sum with its own weights, so a gradient that is reduced once too often, cut at
the wrong place or taken from the wrong rank changes a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxdt_nemo.runtime import collectives as c
from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.groups import Group

Run = Callable[..., list[Any]]
pytestmark = pytest.mark.ranks
Tensors = list[torch.Tensor]

_made: dict[int, Group] = {}


def whole_world(lane: CpuLane) -> Group:
    """One group of all ranks, made once a process."""
    world = lane.world()
    if id(lane) not in _made:
        _made[id(lane)] = lane.groups([world.ranks], "tp")
    return _made[id(lane)]


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ours(lane: CpuLane, name: str, shape: tuple[int, ...], args: tuple[Any, ...], same: bool) -> Tensors:
    """[y, dx] of one collective on this rank; x and the loss's weights differ between ranks unless `same`."""
    group = whole_world(lane)
    x = draw(shape, 1 if same else 1 + group.rank).requires_grad_()
    kept = x.detach().clone()
    y = getattr(c, name)(x, *args, group)
    alike = name in ("reduce", "gather")  # their backward is right for a loss that all ranks share
    weights = draw(tuple(y.shape), 100 if alike else 100 + group.rank)
    (y * weights).sum().backward()
    assert torch.equal(x.detach(), kept), "the input was written to"
    assert x.grad is not None
    return [y.detach(), x.grad]


def expected(t: int, name: str, shape: tuple[int, ...], args: tuple[Any, ...], same: bool) -> list[Tensors]:
    """The same of one process that holds every rank's x: each rank's [y, dx]."""
    xs = [draw(shape, 1 + rank).requires_grad_() for rank in range(t)]
    if same:
        xs = [draw(shape, 1).requires_grad_()] * t
    ys = FORMULAS[name](xs, *args)
    if name in ("reduce", "gather"):
        loss = (ys[0] * draw(tuple(ys[0].shape), 100)).sum()
    else:
        loss = torch.stack([(y * draw(tuple(y.shape), 100 + rank)).sum() for rank, y in enumerate(ys)]).sum()
    grads = torch.autograd.grad(loss, xs[:1] if same else xs)
    return [[y.detach(), grads[0 if same else rank]] for rank, y in enumerate(ys)]


def summed(xs: Tensors) -> torch.Tensor:
    return torch.stack(xs).sum(0)


def reshard_formula(xs: Tensors, from_dim: int, to_dim: int) -> Tensors:
    return list(torch.cat(xs, from_dim).chunk(len(xs), to_dim))


def rotated(xs: Tensors, shift: int) -> Tensors:
    return [xs[(rank - shift) % len(xs)] for rank in range(len(xs))]


FORMULAS: dict[str, Any] = {
    "copy": lambda xs: [x.clone() for x in xs],
    "reduce": lambda xs: [summed(xs)] * len(xs),
    "all_reduce": lambda xs: [summed(xs)] * len(xs),
    "scatter": lambda xs, dim: list(xs[0].chunk(len(xs), dim)),
    "gather": lambda xs, dim: [torch.cat(xs, dim)] * len(xs),
    "all_gather": lambda xs, dim: [torch.cat(xs, dim)] * len(xs),
    "reduce_scatter": lambda xs, dim: list(summed(xs).chunk(len(xs), dim)),
    "reshard": reshard_formula,
}
CASES = [  # name        x's shape    dim...   x is the same on all ranks
    ("copy", (3, 4), (), True),
    ("reduce", (3, 4), (), False),
    ("all_reduce", (3, 4), (), False),
    ("scatter", (12, 5), (0,), True),
    ("scatter", (3, 12, 2), (-2,), True),
    ("scatter", (3, 12), (-1,), True),
    ("gather", (2, 3), (0,), False),
    ("gather", (2, 3), (-1,), False),
    ("all_gather", (2, 3), (0,), False),
    ("all_gather", (2, 3, 2), (1,), False),
    ("all_gather", (2, 3), (-1,), False),
    ("all_gather", (2, 3), (-2,), False),
    ("reduce_scatter", (12, 3), (0,), False),
    ("reduce_scatter", (2, 12, 3), (1,), False),
    ("reduce_scatter", (2, 12), (-1,), False),
    ("reshard", (2, 12), (0, 1), False),
    ("reshard", (12, 5), (-1, 0), False),
    ("reshard", (2, 12, 3), (-1, 1), False),
]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("name", "shape", "args", "same"), CASES)
def test_equals_unsharded(
    ranks: Run, world: int, name: str, shape: tuple[int, ...], args: tuple[Any, ...], same: bool
) -> None:
    found = ranks(world, ours, name, shape, args, same)
    for mine, right in zip(found, expected(world, name, shape, args, same), strict=True):
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def ours_ring(lane: CpuLane, shift: int) -> Tensors:
    group = whole_world(lane)
    x = draw((2, 3), 1 + group.rank).requires_grad_()
    y = c.ring(x, group, shift)
    (y * draw((2, 3), 100 + group.rank)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("shift", [1, -1, 3, 4])
def test_ring(ranks: Run, shift: int) -> None:
    xs, weights = ([draw((2, 3), base + rank) for rank in range(4)] for base in (1, 100))
    for rank, (y, dx) in enumerate(ranks(4, ours_ring, shift)):
        assert torch.equal(y, rotated(xs, shift)[rank])
        assert torch.equal(dx, rotated(weights, -shift)[rank])


def ours_permute(lane: CpuLane) -> Tensors:
    group = whole_world(lane)
    x = draw((2, 3), 1 + group.rank).requires_grad_()
    y = c.permute(x, [(0, 2), (2, 3), (1, 1)], group)
    (y * draw((2, 3), 100 + group.rank)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def test_permute_gives_zeros_to_the_unpaired(ranks: Run) -> None:
    found = ranks(4, ours_permute)
    nothing = torch.zeros(2, 3, dtype=torch.float64)
    for rank, source in enumerate([None, 1, 0, 2]):
        assert torch.equal(found[rank][0], nothing if source is None else draw((2, 3), 1 + source))
    for rank, target in enumerate([2, 1, 3, None]):
        assert torch.equal(found[rank][1], nothing if target is None else draw((2, 3), 100 + target))


# Rows that rank i sends to rank j; every rank sends and receives other counts, none at times.
ROWS = [[1, 0, 2], [3, 1, 0], [2, 2, 1]]


def ours_all_to_all(lane: CpuLane) -> Tensors:
    group = whole_world(lane)
    given, taken = ROWS[group.rank], [row[group.rank] for row in ROWS]
    x = draw((sum(given), 4), 1 + group.rank).requires_grad_()
    y = c.all_to_all(x, group, taken, given)
    (y * draw(tuple(y.shape), 100 + group.rank)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def test_all_to_all_with_unequal_rows(ranks: Run) -> None:
    xs = [draw((sum(row), 4), 1 + rank) for rank, row in enumerate(ROWS)]
    taken = [[row[rank] for row in ROWS] for rank in range(3)]
    pieces = [x.split(row) for x, row in zip(xs, ROWS, strict=True)]
    weights = [draw((sum(taken[rank]), 4), 100 + rank).split(taken[rank]) for rank in range(3)]
    for rank, (y, dx) in enumerate(ranks(3, ours_all_to_all)):
        assert torch.equal(y, torch.cat([pieces[source][rank] for source in range(3)]))
        assert torch.equal(dx, torch.cat([weights[target][rank] for target in range(3)]))


def upstream(lane: CpuLane, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Tensors:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    from megatron.core.tensor_parallel import mappings

    group = whole_world(lane)
    x = draw((8, 4, 8), 1 + group.rank).requires_grad_()
    y = getattr(mappings, name)(x.clone(), *args, group=group.pg, **named)
    (y * draw(tuple(y.shape), 100 + group.rank)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def like_upstream(lane: CpuLane, name: str, args: tuple[Any, ...]) -> Tensors:
    group = whole_world(lane)
    x = draw((8, 4, 8), 1 + group.rank).requires_grad_()
    y = getattr(c, name)(x, *args, group)
    (y * draw(tuple(y.shape), 100 + group.rank)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


MAPPINGS = [  # megatron-core's                             ours
    ("copy_to_tensor_model_parallel_region", {}, "copy", ()),
    ("reduce_from_tensor_model_parallel_region", {}, "reduce", ()),
    ("scatter_to_tensor_model_parallel_region", {}, "scatter", (-1,)),
    ("gather_from_tensor_model_parallel_region", {}, "gather", (-1,)),
    ("scatter_to_sequence_parallel_region", {}, "scatter", (0,)),
    ("gather_from_sequence_parallel_region", {}, "all_gather", (0,)),
    ("gather_from_sequence_parallel_region", {"tensor_parallel_output_grad": False}, "gather", (0,)),
    ("reduce_scatter_to_sequence_parallel_region", {}, "reduce_scatter", (0,)),
    ("all_gather_last_dim_from_tensor_parallel_region", {}, "all_gather", (-1,)),
    ("reduce_scatter_last_dim_to_tensor_parallel_region", {}, "reduce_scatter", (-1,)),
]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("theirs", "named", "name", "args"), MAPPINGS)
def test_equals_megatron(
    ranks: Run, world: int, theirs: str, named: dict[str, Any], name: str, args: tuple[Any, ...]
) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    right = ranks(world, upstream, theirs, (), named)
    for mine, his in zip(ranks(world, like_upstream, name, args), right, strict=True):
        for a, b in zip(mine, his, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def upstream_sp2hp(lane: CpuLane) -> list[Tensors]:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    from megatron.core.tensor_parallel import mappings

    group = whole_world(lane)
    x = draw((3, 8), 1 + group.rank)
    hidden = mappings.all_to_all_sp2hp(x, group=group.pg)
    back = mappings.all_to_all_hp2sp(hidden, group=group.pg)
    mine = c.reshard(x, 0, -1, group)
    return [[hidden, back], [mine, c.reshard(mine, -1, 0, group)]]


def test_reshard_equals_megatron(ranks: Run) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    for (hidden, back), (mine, mine_back) in ranks(4, upstream_sp2hp):
        assert torch.equal(hidden, mine)
        assert torch.equal(back, mine_back)


def second_derivative(lane: CpuLane) -> str:
    group = whole_world(lane)
    x = draw((4,), 1).requires_grad_()
    (dx,) = torch.autograd.grad(c.copy(x, group).square().sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_second_derivative_raises(ranks: Run) -> None:
    assert all("once_differentiable" in text for text in ranks(2, second_derivative))


def bad_calls(lane: CpuLane) -> list[str]:
    group = whole_world(lane)
    x = torch.zeros(4, 3)
    said = []
    calls: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: c.scatter(x, 1, group),
        lambda: c.reduce_scatter(x, -1, group),
        lambda: c.reshard(x, 0, 1, group),
        lambda: c.all_to_all(x[:3], group),
        lambda: c.all_to_all(x, group, [2, 2]),
        lambda: c.permute(x, [(0, 1), (0, 0)], group),
    )
    for call in calls:
        try:
            call()
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


def test_bad_calls_name_shape_and_group(ranks: Run) -> None:
    scatter, reduce_scatter, reshard, rows, half, permute = ranks(2, bad_calls)[0]
    for text in (scatter, reduce_scatter, reshard):
        assert "(4, 3)" in text
        assert "2 ranks of 'tp'" in text
    assert "(3, 3)" in rows
    assert "both output_splits and input_splits" in half
    assert "twice a source" in permute


def in_place(lane: CpuLane) -> dict[str, float]:
    group = whole_world(lane)
    mine = float(group.rank + 1)
    found = {op: float(c.all_reduce_(torch.tensor([mine]), group, op)) for op in ("sum", "avg", "max", "min")}
    found["mean of whole numbers"] = int(c.all_reduce_(torch.tensor([int(mine)]), group, "avg"))
    found["premul"] = float(c.all_reduce_(torch.tensor([mine]), group, lane.premul_sum(0.25)))
    found["broadcast"] = float(c.broadcast_(torch.tensor([mine]), 2, group))
    return found


def test_in_place(ranks: Run) -> None:
    right = {"sum": 10.0, "avg": 2.5, "max": 4.0, "min": 1.0, "premul": 2.5, "broadcast": 3.0}
    right["mean of whole numbers"] = 2
    assert ranks(4, in_place) == [right] * 4


def subgroup_sum(lane: CpuLane) -> list[Any]:
    group = lane.groups([[0, 2], [1, 3]], "odd")
    x = torch.full((2, 1), float(lane.world().rank))
    return [
        float(c.reduce(x, group)[0]),
        c.gather(x, 1, group)[0].tolist(),
        float(c.broadcast_(x.clone(), 0, group)[0]),
        c.ring(x, group)[0].tolist(),
    ]


def test_subgroups(ranks: Run) -> None:
    """Ranks given to a collective are the group's: rank 0 of the group [1, 3] is global rank 1."""
    found = ranks(4, subgroup_sum)
    assert found[0] == [2.0, [0.0, 2.0], 0.0, [2.0]]
    assert found[2] == [2.0, [0.0, 2.0], 0.0, [0.0]]
    assert found[1] == [4.0, [1.0, 3.0], 1.0, [3.0]]
    assert found[3] == [4.0, [1.0, 3.0], 1.0, [1.0]]


def pipeline(lane: CpuLane) -> list[Any]:
    """Each rank sends two tensors to the next and one back, all started before any is waited for."""
    group = whole_world(lane)
    me, t = group.rank, group.size
    sends = [(torch.full((2,), 10.0 * me), (me + 1) % t), (torch.full((3, 1), 10.0 * me + 1), (me + 1) % t)]
    sends.append((torch.tensor([me]), (me - 1) % t))
    receives = [((2,), torch.float32, (me - 1) % t), ((3, 1), torch.float32, (me - 1) % t)]
    first, second, back = c.exchange(sends, [*receives, ((1,), torch.int64, (me + 1) % t)], group).wait()
    assert second.shape == (3, 1)
    return [first[0].item(), second[0].item(), back.item()]


def test_exchange(ranks: Run) -> None:
    assert ranks(4, pipeline) == [[10.0 * p, 10.0 * p + 1, n] for p, n in ((3, 1), (0, 2), (1, 3), (2, 0))]


def view_of(lane: CpuLane) -> list[Any]:
    group = whole_world(lane)
    x = torch.arange(8.0).view(2, 4)
    part = lane.shard(x, 1, group)
    return [part.tolist(), part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()]


def test_shard_is_a_view(ranks: Run) -> None:
    assert ranks(2, view_of) == [[[[0.0, 1.0], [4.0, 5.0]], True], [[[2.0, 3.0], [6.0, 7.0]], True]]


def one_rank(lane: CpuLane) -> list[bool]:
    group = lane.groups([[rank] for rank in range(lane.world().size)], "alone")
    x = torch.ones(2, 2)
    calls = [
        c.copy(x, group),
        c.reduce(x, group),
        c.all_reduce(x, group),
        c.scatter(x, 0, group),
        c.gather(x, 0, group),
    ]
    calls += [c.all_gather(x, 0, group), c.reduce_scatter(x, 0, group), c.all_to_all(x, group), c.ring(x, group)]
    return [y is x for y in (*calls, c.reshard(x, 0, 1, group))]


def test_a_group_of_one_returns_its_input(ranks: Run) -> None:
    assert all(all(row) for row in ranks(2, one_rank))


def bf16_sum(lane: CpuLane) -> list[float]:
    group = whole_world(lane)
    x = torch.full((64,), 256.0 if group.rank == 0 else 1.0, dtype=torch.bfloat16)
    return [float(value) for value in c.reduce(x, group)]


def test_bf16_is_added_in_bf16(ranks: Run) -> None:
    """What gloo.py says: 256+1 stays 256 where the ones are added one by one; all ranks get the same."""
    found = ranks(4, bf16_sum)
    assert found[0] == found[1] == found[2] == found[3]
    assert set(found[0]) == {256.0, 260.0}
