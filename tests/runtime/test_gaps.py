"""What gloo lacks, made real: a pre-multiplied sum, coalescing, the list form of all_to_all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nxdt_nemo.runtime import gaps
from nxdt_nemo.runtime.cpu import CpuLane

Run = Callable[..., list[Any]]
pytestmark = pytest.mark.ranks


def reduced(lane: CpuLane, async_op: bool) -> list[float]:
    """The tensors as they are when the call returns, with nobody waiting for the handle."""
    mine = float(dist.get_rank() + 1)
    found = []
    for op in (None, dist.ReduceOp.SUM, dist.ReduceOp.MAX, lane.premul_sum(0.5)):
        x = torch.full((1 << 20,), mine)
        work = lane.all_reduce(x, op=op, async_op=async_op)
        assert (work is not None) == async_op
        found.append(float(x[-1]))
        if work is not None:
            assert work.wait()
    whole = torch.tensor([dist.get_rank() + 1])
    lane.all_reduce(whole, op=dist.ReduceOp.AVG, async_op=async_op)
    return [*found, int(whole)]


@pytest.mark.parametrize("async_op", [False, True])
def test_all_reduce_is_done_when_it_returns(ranks: Run, async_op: bool) -> None:
    assert ranks(2, reduced, async_op) == [[3.0, 3.0, 2.0, 1.5, 1]] * 2


def torch_says(lane: CpuLane) -> str:
    try:
        with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu")):
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        dist.distributed_c10d._world.pg_coalesce_state.clear()
        return str(error)
    return ""


def coalesced(lane: CpuLane, async_ops: bool) -> list[list[float]]:
    mine, world = float(dist.get_rank()), dist.get_world_size()
    sums = [torch.full((size,), mine) for size in (1, 3)]
    with lane.coalescing(None, device=lane.device(), async_ops=async_ops) as handle:
        for x in sums:
            dist.all_reduce(x, async_op=async_ops)
    if async_ops:
        handle.wait()
    whole, part = torch.empty(world), torch.empty(1)
    with lane.coalescing(async_ops=async_ops) as handle:
        dist.all_gather_into_tensor(whole, torch.tensor([mine]), async_op=async_ops)
    if async_ops:
        handle.wait()
    with lane.coalescing(async_ops=async_ops) as handle:
        dist.reduce_scatter_tensor(part, torch.arange(float(world)) + mine, async_op=async_ops)
    if async_ops:
        handle.wait()
    return [x.tolist() for x in (*sums, whole, part)]


@pytest.mark.parametrize("async_ops", [False, True])
def test_coalescing(ranks: Run, async_ops: bool) -> None:
    assert "startCoalescing" in ranks(2, torch_says)[0], "gloo has it now: gaps.coalescing can go"
    right = [[1.0], [1.0] * 3, [0.0, 1.0]]
    assert ranks(2, coalesced, async_ops) == [[*right, [1.0]], [*right, [3.0]]]


def exchanged(lane: CpuLane, async_op: bool) -> list[list[list[float]]]:
    me, world = dist.get_rank(), dist.get_world_size()
    given = [torch.full((peer + 1, 2), 10.0 * me + peer) for peer in range(world)]
    taken = [torch.empty(me + 1, 2) for _ in range(world)]
    gaps.all_to_all(taken, given, async_op=async_op)
    return [x.tolist() for x in taken]


@pytest.mark.parametrize("async_op", [False, True])
def test_all_to_all_list(ranks: Run, async_op: bool) -> None:
    for me, taken in enumerate(ranks(3, exchanged, async_op)):
        assert taken == [[[10.0 * source + me] * 2] * (me + 1) for source in range(3)]


def uneven(lane: CpuLane, async_op: bool) -> list[Any]:
    """Rank r has r rows (rank 0 none): gathered, and their sums scattered again."""
    me, world = dist.get_rank(), dist.get_world_size()
    whole = torch.empty(sum(range(world)), 2)
    mine = torch.full((me, 2), float(me))
    gaps.all_gather(list(whole.split(list(range(world)))), mine, async_op=async_op)
    part = torch.empty(me, 2)
    gaps.reduce_scatter(part, list((whole * 10**me).split(list(range(world)))), async_op=async_op)
    even = [torch.empty(1), torch.empty(1), torch.empty(1)]
    gaps.all_gather(even, torch.tensor([float(me)]))
    summed = torch.empty(1)
    gaps.reduce_scatter(summed, even)
    return [whole.tolist(), part.tolist(), summed.tolist()]


@pytest.mark.parametrize("async_op", [False, True])
def test_ranks_with_different_sizes(ranks: Run, async_op: bool) -> None:
    for me, (whole, part, summed) in enumerate(ranks(3, uneven, async_op)):
        assert whole == [[1.0] * 2, [2.0] * 2, [2.0] * 2]
        assert part == [[111.0 * me] * 2] * me
        assert summed == [3.0 * me]


def largest(lane: CpuLane) -> str:
    with pytest.raises(ValueError, match="sums only") as caught:
        gaps.reduce_scatter(torch.empty(dist.get_rank()), [torch.ones(0), torch.ones(1)], op=dist.ReduceOp.MAX)
    return str(caught.value)


def test_different_sizes_are_summed_only(ranks: Run) -> None:
    assert all("different sizes" in said for said in ranks(2, largest))


def dropped_while_sent(lane: CpuLane) -> list[float]:
    """Rank 0 gives its memory to others as soon as the transfer is started; rank 1 takes it later."""
    size = 1 << 16
    if dist.get_rank():
        taken = torch.empty(size)
        dist.barrier()
        dist.recv(taken, 0)
        return [float(taken.min()), float(taken.max())]
    given = torch.ones(size)
    work = gaps.isend(given, 1)
    assert work is not None
    given.data = torch.empty(1)  # as megatron-core's deallocate_output_tensor
    others = [torch.full((size,), 7.0) for _ in range(8)]
    dist.barrier()
    work.wait()
    return [float(others[0].min()), 1.0]


def test_what_is_sent_keeps_its_memory(ranks: Run) -> None:
    assert ranks(2, dropped_while_sent) == [[7.0, 1.0], [1.0, 1.0]]
