"""torch.distributed on XLA tensors, for upstream's direct calls.

Room runtime/. Stands in for torch_xla/distributed/xla_backend.py (2.9), whose groups of some ranks know only
themselves, whose all-to-all ignores them and whose barrier does nothing. Host tensors (objects, flags, barriers) go
over gloo. Imports torch. Proof: tests/runtime/test_xla.py, tests/megatron/test_xla.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.ops import Arriving, Ops
from nxdt_nemo.runtime.select import current

__all__ = ["XlaProcessGroup", "done", "register"]

NAMES = ("sum", "avg", "max", "min")
Work = Any
c10d: Any = _distributed_c10d  # its stubs are of C++'s overloads, and not all


# torch's own operators, which groups of torch's backends go through. torch_xla falls back to the host for them: gloo
# reduces the copies, and nothing is written back.
OPERATORS = (
    "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_",
    "alltoall_", "alltoall_base_", "broadcast_", "gather_", "_allgather_base_", "_reduce_scatter_base_", "recv_",
    "recv_any_source_", "reduce_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_", "scatter_", "send",
)  # fmt: skip
_refusals: list[torch.library.Library] = []


def register(name: str) -> None:
    """Let torch.distributed make process groups of backend `name`, and those of others refuse XLA tensors."""
    if name.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(name, XlaProcessGroup, devices=["xla"])
    if not _refusals:
        _refusals.append(torch.library.Library("c10d", "IMPL", "XLA"))
        for operator in OPERATORS:
            _refusals[0].impl(operator, functools.partial(_refuse, operator))


def _refuse(operator: str, *_: Any) -> Any:
    raise LaneError(
        f"{operator.strip('_')} of tensors on the device, in a process group of another backend, would change nothing",
        fix="make the group without backend=, or give it tensors of the host",
    )


def _name_of(op: Any) -> str:
    for name in NAMES:
        if op == getattr(dist.ReduceOp, name.upper()):  # torch's own are equal, and have other hashes
            return name
    raise LaneError(f"reducing by {op} has no counterpart on the xla lane", fix=f"use one of {', '.join(NAMES)}")


def done(tensors: Any) -> Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(tensors)
    return c10d._create_work_from_future(future)


class _Transfer(c10d.Work):
    """A transfer under way; wait() writes what arrives into `targets`."""

    def __init__(self, arriving: Arriving, targets: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._arriving: Arriving | None = arriving
        self._targets = targets

    @torch.no_grad()
    def wait(self, timeout: Any = None) -> bool:
        if self._arriving is not None:
            for target, arrived in zip(self._targets, self._arriving.wait(), strict=True):
                target.copy_(arrived)
            self._arriving = None
        return True

    def is_completed(self) -> bool:
        return self._arriving is None


class XlaProcessGroup(c10d.ProcessGroup):
    """A process group whose collectives on XLA tensors are the lane's, and on host tensors gloo's."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo: Any = _of_the_host(store, rank, size, timeout)
        self._described = ""

    def getBackendName(self) -> str:
        return "nxdt_xla"

    def _set_group_name(self, name: str) -> None:
        self._named = name

    @property
    def group_name(self) -> str:
        return self._named

    def _set_group_desc(self, name: str) -> None:
        self._described = name

    @property
    def group_desc(self) -> str:
        return self._described

    @property
    def _group(self) -> Group:
        return current().group_of(self)

    @property
    def _ops(self) -> Ops:
        return current().ops

    # --- collectives, by the names of torch._C._distributed_c10d.ProcessGroup ---

    @torch.no_grad()
    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Work:
        if not _on_xla(tensors):
            return self._gloo.allreduce(tensors, opts or c10d.AllreduceOptions())
        op = "sum" if opts is None else _name_of(opts.reduceOp)
        for tensor in tensors:
            self._ops.all_reduce_(tensor, self._group, op)
        return done(tensors)

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Work:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any) -> Work:
        return self.allreduce(tensors, opts) if _on_xla(tensors) else self._gloo.reduce(tensors, opts)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Work:
        if not _on_xla(tensors):
            return self._gloo.broadcast(tensors, opts)
        for tensor in tensors:
            self._ops.broadcast_(tensor, opts.rootRank, self._group)
        return done(tensors)

    @torch.no_grad()
    def _allgather_base(self, whole: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Work:
        if not _on_xla([whole, mine]):
            return self._gloo._allgather_base(whole, mine, opts or c10d.AllgatherOptions())
        whole.copy_(self._ops.all_gather(mine.reshape(-1), 0, self._group).view(whole.shape))
        return done([whole])

    @torch.no_grad()
    def allgather(
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Work:
        if not _on_xla(inputs):
            return self._gloo.allgather(outputs, inputs, opts or c10d.AllgatherOptions())
        for parts, mine in zip(outputs, inputs, strict=True):
            for part, one in zip(parts, self._ops.all_gather(mine[None], 0, self._group).unbind(0), strict=True):
                part.copy_(one)
        return done(outputs)

    def allgather_into_tensor_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Work:
        for whole, mine in zip(outputs, inputs, strict=True):
            self._allgather_base(whole, mine)
        return done(outputs)

    @torch.no_grad()
    def _reduce_scatter_base(self, mine: torch.Tensor, whole: torch.Tensor, opts: Any = None) -> Work:
        if not _on_xla([whole, mine]):
            return self._gloo._reduce_scatter_base(mine, whole, opts or c10d.ReduceScatterOptions())
        op = "sum" if opts is None else _name_of(opts.reduceOp)
        if op not in ("sum", "avg"):
            raise LaneError(f"reduce_scatter by {op} has no counterpart on the xla lane", fix="use sum or avg")
        found = self._ops.reduce_scatter(whole.reshape(-1), 0, self._group)
        mine.copy_((found / self.size() if op == "avg" else found).view(mine.shape))
        return done([mine])

    def reduce_scatter_tensor_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Work:
        for mine, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(mine, whole, opts)
        return done(outputs)

    @torch.no_grad()
    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> Work:
        if not _on_xla(outputs):
            return self._gloo.reduce_scatter(outputs, inputs, opts or c10d.ReduceScatterOptions())
        for mine, parts in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(mine, torch.stack(list(parts)), opts)
        return done(outputs)

    @torch.no_grad()
    def alltoall_base(
        self, output: torch.Tensor, given: torch.Tensor, out: Sequence[int], sizes: Sequence[int], opts: Any = None
    ) -> Work:
        if not _on_xla([output, given]):
            return self._gloo.alltoall_base(output, given, list(out), list(sizes), opts or c10d.AllToAllOptions())
        found = self._ops.all_to_all(given, self._group, out or None, sizes or None)
        output.copy_(found.view(output.shape))
        return done([output])

    def barrier(self, opts: Any = None) -> Work:
        return self._gloo.barrier(opts or c10d.BarrierOptions())

    # Started here, done in wait: in a pipeline both neighbours send before they receive. Tags are gloo's only.

    def send(self, tensors: Sequence[torch.Tensor], target: int, tag: int = 0) -> Work:
        if not _on_xla(tensors):
            return self._gloo.send(tensors, target, tag)
        return _Transfer(self._ops.exchange([(tensor.detach(), target) for tensor in tensors], [], self._group), ())

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> Work:
        if not _on_xla(tensors):
            return self._gloo.recv(tensors, source, tag)
        wanted = [(tuple(tensor.shape), tensor.dtype, source) for tensor in tensors]
        return _Transfer(self._ops.exchange([], wanted, self._group), tensors)

    def gather(self, outputs: Any, inputs: Sequence[torch.Tensor], opts: Any) -> Work:
        return self._host_only("gather", inputs).gather(outputs, inputs, opts)

    def scatter(self, outputs: Sequence[torch.Tensor], inputs: Any, opts: Any) -> Work:
        return self._host_only("scatter", outputs).scatter(outputs, inputs, opts)

    def _host_only(self, name: str, tensors: Sequence[torch.Tensor]) -> Any:
        if _on_xla(tensors):
            raise LaneError(f"torch.distributed.{name} of tensors on the device has no counterpart on the xla lane")
        return self._gloo


def _of_the_host(store: Any, rank: int, size: int, timeout: Any) -> Any:
    """gloo; where the process only stands for a rank of a world, nobody."""
    if current().alone:
        from nxdt_nemo.runtime.xla.world import Alone

        return Alone(rank, size)
    return c10d.ProcessGroupGloo(store, rank, size, timeout)


def _on_xla(tensors: Sequence[torch.Tensor]) -> bool:
    return any(tensor.device.type == "xla" for tensor in tensors)
