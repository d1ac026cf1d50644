"""One process that traces as a rank of a world it is alone in: to lower a step, or to lift it over many devices.

Room runtime/. Nothing is sent: groups are made in a store that answers by itself, and collectives of device tensors go
into the graph. Imports torch. Proof: tests/runtime/test_xla_world.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.xla.in_graph import Dialect, in_graph
from nxdt_nemo.runtime.xla.process_group import done

if TYPE_CHECKING:
    from nxdt_nemo.runtime.xla.lane import XlaLane

__all__ = ["Alone", "pretend"]


@contextmanager
def pretend(lane: XlaLane, rank: int, world: int, dialect: Dialect) -> Iterator[None]:
    """Be rank `rank` of `world` within. Raises LaneError where ranks are up already."""
    if dist.is_initialized():
        raise LaneError("ranks are up: a world can be pretended in a process of its own only", place="pretend")
    if not 0 <= rank < world:
        raise LaneError(f"rank {rank} is not in a world of {world}", place="pretend")
    lane.alone, lane.ops = True, in_graph(dialect)
    lane.register_backend()
    try:
        dist.init_process_group(lane.backend, store=FakeStore(), rank=rank, world_size=world)
        yield
    finally:
        lane.forget_ranks()
        lane.alone = False
        del lane.ops


class Alone:
    """What stands where process groups have gloo for host tensors: waits for nobody, and makes up no numbers."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def barrier(self, opts: Any = None) -> Any:
        return done([])

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        return done(tensors)

    def __getattr__(self, name: str) -> Any:
        raise LaneError(f"{name} of tensors on the host needs the other ranks, and this process only stands for one")
