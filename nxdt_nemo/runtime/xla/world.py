"""One process that traces as a rank of a world it is alone in: to lower a step, or to lift it over many devices.

Room runtime/. Nothing is sent: groups are made in a store that answers by itself, and collectives of device tensors go
into the graph. Imports torch. Proof: tests/runtime/test_xla_world.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch_xla
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch_xla.core.xla_builder import create_placeholder_tensor

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.xla.freed_memory import give_back_freed_memory
from nxdt_nemo.runtime.xla.in_graph import Dialect, in_graph
from nxdt_nemo.runtime.xla.process_group import done

if TYPE_CHECKING:
    from nxdt_nemo.runtime.xla.lane import XlaLane

__all__ = ["Alone", "Recorder", "blank", "is_given", "pretend"]


@contextmanager
def pretend(
    lane: XlaLane, rank: int, world: int, dialect: Dialect, cut: Callable[[], None] | None = None
) -> Iterator[None]:
    """Be rank `rank` of `world` within. Raises LaneError where ranks are up already.

    cut   called where a graph would be handed over, in place of that
    """
    if dist.is_initialized():
        raise LaneError("ranks are up: a world can be pretended in a process of its own only", place="pretend")
    if not 0 <= rank < world:
        raise LaneError(f"rank {rank} is not in a world of {world}", place="pretend")
    give_back_freed_memory()
    lane.alone, lane.ops, lane.on_cut = True, in_graph(dialect), cut
    lane.register_backend()
    try:
        dist.init_process_group(lane.backend, store=FakeStore(), rank=rank, world_size=world)
        yield
    finally:
        _end_collectives()
        lane.forget_ranks()
        lane.alone, lane.on_cut = False, None
        del lane.ops


class Recorder:
    """Takes each graph that would be run, and lets tensors without contents stand for its results.

    keys     of the graphs, in order: torch_xla compiles graphs of one key once
    graphs   their HLO texts, "" for those of a time when nobody was `reading`
    What only autograd holds at a cut inside a step is traced again in the next graph.
    """

    def __init__(self) -> None:
        self.reading = True
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.keys: list[bytes] = []
        self.graphs: list[str] = []

    def cut(self) -> None:
        gc.unfreeze()  # what a strategy froze is listed as well
        kinds = {*_subclasses(torch.Tensor)}  # isinstance of a tensor's class costs seconds for a million objects
        live = [one for one in gc.get_objects() if type(one) in kinds and one.device.type == "xla"]
        # As torch_xla has them, in the order they were made: the collector's is another one in each process.
        pending = sorted(
            (one for one in live if not torch_xla._XLAC._is_placecholder(one)), key=torch_xla._XLAC._xla_get_tensor_id
        )
        if not pending:
            return
        self.keys.append(torch_xla._XLAC._get_graph_hash(pending))
        self.graphs.append(torch_xla._XLAC._get_xla_tensors_hlo(pending) if self.reading else "")
        for tensor in pending:
            blank(tensor)
        # Collectives follow each other by a token, which would lead back into the graph that is done.
        _end_collectives()


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    below: list[type] = type.__subclasses__(kind)
    for one in below:
        yield from _subclasses(one)


@torch.no_grad()
def _end_collectives() -> None:
    """The next collective follows none: torch_xla orders them, those of a step that was cut short by an error too."""
    torch_xla._XLAC._set_all_reduce_token(str(torch_xla.device()), None)


def blank(tensor: torch.Tensor) -> None:
    """Take a tensor's contents away; its shape and dtype stay, and a graph has it as a parameter."""
    tensor.data = create_placeholder_tensor(list(tensor.shape), tensor.dtype)


def is_given(tensor: torch.Tensor) -> bool:
    """Whether the host gave a tensor of the device its contents, and nothing is to be computed for it."""
    node = torch_xla._XLAC._get_xla_tensor_debug_info(tensor).partition("\nIR: ")[2].partition("\n")[0]
    return not torch_xla._XLAC._is_placecholder(tensor) and (node == "None" or "xla::device_data" in node)


class Alone:
    """What stands where process groups have gloo for host tensors: waits for nobody, and has this rank's own word for
    what the others would say. What adds numbers up is refused."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def barrier(self, opts: Any = None) -> Any:
        return done([])

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        return done(tensors)

    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Any:
        for parts, mine in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(mine)
        return done(outputs)

    def __getattr__(self, name: str) -> Any:
        raise LaneError(f"{name} of tensors on the host needs the other ranks, and this process only stands for one")
