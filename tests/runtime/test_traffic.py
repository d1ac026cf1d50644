"""Counting where the process groups are: right while asked, also in other threads, and not a line of it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from nxdt_nemo.runtime import collectives as c
from nxdt_nemo.runtime import gaps
from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.traffic import CONTROL, count_traffic, methods

Run = Callable[..., list[Any]]
Found = dict[tuple[str, str], tuple[int, int]]


class Summed(torch.autograd.Function):
    """As an upstream layer: its gradient is all-reduced, by a call of torch.distributed's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].clone()
        work = dist.all_reduce(total, group=ctx.group, async_op=True)
        work.wait()
        return total, None


def step(lane: CpuLane, tp: Any, alone: Any) -> None:
    """Each call once, of tensors whose sizes tell them apart."""
    peer, bound = 1 - tp.rank, dist.all_gather_into_tensor
    Summed.apply(torch.ones(4, 8, requires_grad=True), tp.pg).sum().backward()  # 128 bytes
    c.reduce_scatter(torch.ones(4, 8, requires_grad=True), 0, tp).sum().backward()  # and the gradient gathered
    dist.all_reduce(torch.ones(3), op=dist.ReduceOp.MAX)
    bound(torch.empty(10), torch.ones(5), group=tp.pg)
    with lane.coalescing(tp.pg):
        for size in (7, 9):
            dist.all_reduce(torch.ones(size), group=tp.pg)
    ops = [dist.P2POp(dist.isend, torch.ones(6), peer, tp.pg), dist.P2POp(dist.irecv, torch.empty(6), peer, tp.pg)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    dist.all_to_all_single(torch.empty(2, 4), torch.ones(2, 4), group=tp.pg)
    mine = (3, 5)[tp.rank]  # unlike sizes, which gloo has an all-to-all for only
    gaps.all_gather([torch.empty(3), torch.empty(5)], torch.ones(mine), tp.pg)
    gaps.reduce_scatter(torch.empty(mine), [torch.ones(3), torch.ones(5)], group=tp.pg)
    dist.broadcast(torch.ones(11), 0, group=tp.pg)
    c.all_reduce_(torch.ones(1000), alone)
    dist.all_gather_object([None, None], {"a": 1}, group=tp.pg)
    dist.barrier(group=tp.pg)


RIGHT = {
    ("all_reduce", "tp"): (2, 128 + 64),  # one in backward; two that are coalesced are one call
    ("all_reduce", "default_pg"): (1, 12),
    ("reduce_scatter", "tp"): (2, 128 + 32),
    ("all_gather", "tp"): (3, 128 + 40 + 32),
    ("send", "tp"): (1, 24),
    ("recv", "tp"): (1, 24),
    ("all_to_all", "tp"): (1, 32),
    ("broadcast", "tp"): (1, 44),
    ("barrier", "tp"): (1, 0),
}


def counted(lane: CpuLane) -> tuple[Found, Found, set[str], bool]:
    """Around both steps, around the second, who called in that, and whether all is as before."""
    tp, alone = lane.groups([[0, 1]], "tp"), lane.groups([[0], [1]], "alone")
    before = methods()
    step(lane, tp, alone)
    with count_traffic() as outer:
        step(lane, tp, alone)
        with count_traffic() as inner:
            step(lane, tp, alone)
    places = {place.partition(":")[0] for sent in inner.values() for place in sent.places}
    seen, once = ({key: (sent.calls, sent.bytes) for key, sent in found.items()} for found in (outer, inner))
    return seen, once, places, all(ProcessGroup.__dict__[name] is method for name, method in before.items())


@pytest.mark.ranks
def test_calls_and_bytes(ranks: Run) -> None:
    for outer, inner, places, restored in ranks(2, counted):
        calls, nbytes = inner.pop(("all_gather_object", "tp"))
        assert calls == 2 and nbytes > 16  # sizes, then the pickles
        assert inner == RIGHT
        outer.pop(("all_gather_object", "tp"))
        assert outer == {key: (2 * calls, 2 * nbytes) for key, (calls, nbytes) in RIGHT.items()}
        assert "test_traffic.py" in places and not {"distributed_c10d.py", "c10d_logger.py", "gloo.py"} & places
        assert restored


def in_a_thread(lane: CpuLane) -> Found:
    """A backward pass in a thread of its own, as autograd has for devices."""
    from threading import Thread

    tp = lane.groups([[0, 1]], "tp")
    loss = Summed.apply(torch.ones(4, 8, requires_grad=True), tp.pg).sum()
    with count_traffic() as found:
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join()
    return {key: (sent.calls, sent.bytes) for key, sent in found.items()}


@pytest.mark.ranks
def test_another_thread_is_seen(ranks: Run) -> None:
    assert ranks(2, in_a_thread) == [{("all_reduce", "tp"): (1, 128)}] * 2


def test_an_error_inside_restores_the_class() -> None:
    before = methods()

    def fails() -> None:
        with count_traffic():
            assert ProcessGroup.__dict__["allreduce"] is not before["allreduce"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert methods() == before


def test_every_method_that_moves_something_is_counted() -> None:
    other = {"rank", "size", "name", "boxed", "unbox", "abort", "shutdown", "set_timeout", "get_group_store", "options"}
    other |= {"split_group", "merge_remote_group"}
    later = {"get_backend", "new_window", "reconfigure", "get_reconfigure_handle"}  # of torch 2.14
    later |= {f"{do}_{which}_hook" for do in ("register", "unregister") for which in ("pre", "post", "abort")}
    public = {name for name, value in ProcessGroup.__dict__.items() if callable(value) and not name.startswith("_")}
    assert public - other - later - {"BackendType"} == {name for name in methods() if not name.startswith("_")}
    assert {"barrier", "all_gather_object"} <= CONTROL
