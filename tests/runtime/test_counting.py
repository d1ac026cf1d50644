"""Counting of collectives: right while asked, and not a line of it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxdt_nemo.runtime import collectives as c
from nxdt_nemo.runtime import gloo
from nxdt_nemo.runtime.counting import COUNTED, Count, count_collectives
from nxdt_nemo.runtime.cpu import CpuLane

Run = Callable[..., list[Any]]


def step(lane: CpuLane) -> None:
    group = lane.groups([list(lane.world().ranks)], "tp")
    x = torch.ones(4, 8, requires_grad=True)  # 128 bytes
    c.reduce(c.copy(x, group), group).sum().backward()
    c.all_gather(x, 0, group).sum().backward()
    c.reduce_scatter(x, 0, lane.world()).sum().backward()
    c.all_to_all(x.detach().bfloat16(), group)
    c.ring(x.detach(), group)
    peer = 1 - group.rank
    c.exchange([(torch.ones(3), peer)], [((3,), torch.float32, peer)], group).wait()
    c.broadcast_(torch.ones(2), 0, group)


def counted(lane: CpuLane) -> list[Any]:
    step(lane)
    with count_collectives(lane.ops) as outer:
        step(lane)
        with count_collectives(lane.ops) as inner:
            step(lane)
    seen = {key: (count.calls, count.bytes) for key, count in outer.items()}
    once = {key: (count.calls, count.bytes) for key, count in inner.items()}
    plain = gloo.table()
    return [seen, once, all(getattr(lane.ops, name) is getattr(plain, name) for name in COUNTED)]


@pytest.mark.ranks
def test_calls_and_bytes(ranks: Run) -> None:
    right = {
        ("all_reduce_", "tp"): (2, 256),  # forward of reduce, backward of copy
        ("all_gather", "tp"): (1, 256),  # 2 ranks' 128
        ("reduce_scatter", "tp"): (1, 256),  # backward of all_gather
        ("reduce_scatter", "default_pg"): (1, 128),
        ("all_gather", "default_pg"): (1, 128),  # backward of reduce_scatter
        ("all_to_all", "tp"): (1, 64),
        ("permute", "tp"): (1, 128),
        ("exchange", "tp"): (1, 12),
        ("broadcast_", "tp"): (1, 8),
    }
    for outer, inner, restored in ranks(2, counted):
        assert inner == right
        assert outer == {key: (2 * calls, 2 * nbytes) for key, (calls, nbytes) in right.items()}
        assert restored


def test_an_error_inside_restores_the_table() -> None:
    ops = gloo.table()

    def fails() -> None:
        with count_collectives(ops):
            assert ops.all_gather is not gloo.table().all_gather
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert ops == gloo.table()


def test_every_collective_is_counted_but_the_view() -> None:
    assert set(gloo.table().__slots__) - set(COUNTED) == {"shard"}
    assert Count() == Count(0, 0)
