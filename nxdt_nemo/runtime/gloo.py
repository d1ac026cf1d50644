"""Raw collectives of the lanes that are eager: torch.distributed, one call away; on the cpu lane gloo.

Room runtime/. Imports torch. Proof: tests/runtime/test_collectives.py, test_neuron.py.

gloo adds bfloat16 in bfloat16, rounding after each rank's term, in an order that differs by chunk: on 4 ranks
256+1+1+1 is 256 in some elements of one tensor and 260 in others (259 rounds to 260), the same on all ranks.
The mean error of a sum of 4 normals is 1.6 times that of rounding once. Reduce in float32 what must not
depend on that (Megatron's main_grad does).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nxdt_nemo.runtime import gaps
from nxdt_nemo.runtime.gaps import PremulSum
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.ops import Ops, Receive, Send, equal_part

__all__ = ["table"]

REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def table(device: torch.device | None = None) -> Ops:
    """A new table with the functions of this file.

    device  where tensors from other ranks arrive; None is the host
    """
    return Ops(
        all_reduce_=_all_reduce_,
        broadcast_=_broadcast_,
        all_gather=_all_gather,
        reduce_scatter=_reduce_scatter,
        all_to_all=_all_to_all,
        permute=_permute,
        exchange=functools.partial(_exchange, device=device) if device else _exchange,
        shard=_shard,
    )


def _all_reduce_(x: torch.Tensor, group: Group, op: Any = "sum") -> torch.Tensor:
    gaps.all_reduce(x, op if isinstance(op, PremulSum) else REDUCTIONS[op], group.pg)
    return x


def _broadcast_(x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
    dist.broadcast(x, group.ranks[source], group=group.pg)
    return x


def _all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    shape = list(x.shape)
    shape[0] *= group.size
    whole = x.new_empty(shape)
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group.pg)
    if dim in (0, -x.dim()):
        return whole
    return torch.cat(whole.chunk(group.size), dim)


def _reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    part = equal_part(x, dim, group)
    if dim not in (0, -x.dim()):
        x = torch.cat(x.split(part, dim))
    shape = list(x.shape)
    shape[0] //= group.size
    out = x.new_empty(shape)
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group.pg)
    return out


def _all_to_all(
    x: torch.Tensor, group: Group, out: Sequence[int] | None = None, given: Sequence[int] | None = None
) -> torch.Tensor:
    if given is None:
        equal_part(x, 0, group)
    rows = x.shape[0] if out is None else sum(out)
    received = x.new_empty((rows, *x.shape[1:]))
    splits = None if out is None else list(out), None if given is None else list(given)
    dist.all_to_all_single(received, x.contiguous(), *splits, group=group.pg)
    return received


def _permute(x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
    if (group.rank, group.rank) in pairs:  # gloo has no connection of a rank with itself
        return x.clone()
    sends: list[Send] = [(x, target) for source, target in pairs if source == group.rank]
    receives: list[Receive] = [(x.shape, x.dtype, source) for source, target in pairs if target == group.rank]
    arrived = _exchange(sends, receives, group, x.device).wait()
    return arrived[0] if arrived else torch.zeros_like(x)


@dataclass(frozen=True)
class _Arriving:
    """Works under way; keeps what is being sent alive until then."""

    works: Sequence[dist.Work]
    sent: Sequence[torch.Tensor]
    received: list[torch.Tensor]

    def wait(self) -> list[torch.Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _exchange(
    sends: Sequence[Send], receives: Sequence[Receive], group: Group, device: torch.device | None = None
) -> _Arriving:
    sent = [tensor.contiguous() for tensor, _ in sends]
    received = [torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype, _ in receives]
    pairs = zip(sent, sends, strict=True)
    batch = [dist.P2POp(dist.isend, tensor, group=group.pg, group_peer=peer) for tensor, (_, peer) in pairs]
    for buffer, (_, _, peer) in zip(received, receives, strict=True):
        batch.append(dist.P2POp(dist.irecv, buffer, group=group.pg, group_peer=peer))
    return _Arriving(dist.batch_isend_irecv(batch) if batch else (), sent, received)


def _shard(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    part = equal_part(x, dim, group)
    return x.narrow(dim, group.rank * part, part)
