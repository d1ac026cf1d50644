"""How the ranks of a group exchange XLA tensors, and the lane's table of collectives on top of it.

Room runtime/. Functional: no argument is written to. Imports torch and torch_xla.
Proof: tests/runtime/test_xla.py, tests/megatron/test_xla.py.

Processes on XLA:CPU, whose client sees a world of one: the graph is cut and host copies go over gloo. A group of one
rank needs nothing. Collectives inside the graph are not there yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.gaps import PremulSum
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.ops import Ops, Receive, Send

__all__ = ["Hosted", "Transport", "Unavailable", "cut", "table"]


class Transport(ABC):
    """Collectives over more than one rank. Shapes as in runtime/ops.py; op is "sum", "avg", "max" or "min"."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor, op: str, group: Group) -> torch.Tensor: ...

    @abstractmethod
    def broadcast(self, x: torch.Tensor, source: int, group: Group) -> torch.Tensor: ...

    @abstractmethod
    def all_gather(self, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor: ...

    @abstractmethod
    def reduce_scatter(self, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor: ...

    @abstractmethod
    def all_to_all(
        self, x: torch.Tensor, group: Group, out: Sequence[int] | None, given: Sequence[int] | None
    ) -> torch.Tensor: ...

    @abstractmethod
    def permute(self, x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor: ...

    @abstractmethod
    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive], group: Group) -> list[torch.Tensor]: ...

    @abstractmethod
    def shard(self, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor: ...


class Unavailable(Transport):
    """No rank but this one can be reached. Raises LaneError, whatever is asked for."""

    def _no(self, *_: Any) -> Any:
        raise LaneError("collectives between NeuronCores are not in this release yet", fix="use one rank")

    all_reduce = broadcast = all_gather = reduce_scatter = _no  # type: ignore[assignment]
    all_to_all = permute = exchange = shard = _no  # type: ignore[assignment]


class Hosted(Transport):
    """Processes on XLA:CPU: what was traced is computed, and its host copy goes over gloo."""

    def all_reduce(self, x: torch.Tensor, op: str, group: Group) -> torch.Tensor:
        host = _host(x)
        dist.all_reduce(host, getattr(dist.ReduceOp, op.upper()), group=group.pg)
        return host.to(x.device)

    def broadcast(self, x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
        host = _host(x)
        dist.broadcast(host, group.ranks[source], group=group.pg)
        return host.to(x.device)

    def all_gather(self, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        host = _host(x)
        whole = host.new_empty((group.size, *host.shape))
        dist.all_gather_into_tensor(whole.view(-1), host.view(-1), group=group.pg)
        return torch.cat(whole.unbind(0), dim).to(x.device)

    def reduce_scatter(self, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        parts = torch.stack(_host(x).chunk(group.size, dim)).contiguous()
        mine = parts.new_empty(parts.shape[1:])
        dist.reduce_scatter_tensor(mine.view(-1), parts.view(-1), group=group.pg)
        return mine.to(x.device)

    def all_to_all(
        self, x: torch.Tensor, group: Group, out: Sequence[int] | None, given: Sequence[int] | None
    ) -> torch.Tensor:
        host = _host(x)
        rows = host.shape[0] if out is None else sum(out)
        received = host.new_empty((rows, *host.shape[1:]))
        splits = None if out is None else list(out), None if given is None else list(given)
        dist.all_to_all_single(received, host, *splits, group=group.pg)
        return received.to(x.device)

    def permute(self, x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
        if (group.rank, group.rank) in pairs:
            return x
        sends: list[Send] = [(x, target) for source, target in pairs if source == group.rank]
        receives: list[Receive] = [(x.shape, x.dtype, source) for source, target in pairs if target == group.rank]
        arrived = self.exchange(sends, receives, group)
        return arrived[0] if arrived else torch.zeros_like(x)

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive], group: Group) -> list[torch.Tensor]:
        device = torch_xla.device()
        sent = [_host(tensor) for tensor, _ in sends]
        batch = [
            dist.P2POp(dist.isend, host, group=group.pg, group_peer=peer)
            for host, (_, peer) in zip(sent, sends, strict=True)
        ]
        received = [torch.empty(tuple(shape), dtype=dtype) for shape, dtype, _ in receives]
        batch += [
            dist.P2POp(dist.irecv, host, group=group.pg, group_peer=peer)
            for host, (_, _, peer) in zip(received, receives, strict=True)
        ]
        for work in dist.batch_isend_irecv(batch) if batch else ():
            work.wait()
        return [host.to(device) for host in received]

    def shard(self, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        part = x.shape[dim] // group.size
        return x.narrow(dim, group.rank * part, part)


def _host(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the host. The graph is cut first: a copy alone would compile what only it needs."""
    cut()
    return x.detach().cpu().contiguous()


def cut() -> None:
    """Hand over what was traced. torch_xla moves its random state on when it does: here it stays, or numbers that are
    drawn again from a state would depend on where graphs were cut."""
    state = xm.get_rng_state()
    torch_xla.sync()
    xm.set_rng_state(state)


# --- the lane's table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrived:
    """Transfers that are done."""

    received: list[torch.Tensor]

    def wait(self) -> list[torch.Tensor]:
        return self.received


def table(transport: Transport) -> Ops:
    """A new table over a transport."""

    def all_reduce_(x: torch.Tensor, group: Group, op: Any = "sum") -> torch.Tensor:
        if isinstance(op, PremulSum):
            x.mul_(op.factor)
            op = "sum"
        return x if group.size == 1 else x.copy_(transport.all_reduce(x, op, group))

    def broadcast_(x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
        return x if group.size == 1 else x.copy_(transport.broadcast(x, source, group))

    def all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        return x if group.size == 1 else transport.all_gather(x, dim, group)

    def reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        _divides(x, dim, group)
        return x if group.size == 1 else transport.reduce_scatter(x, dim, group)

    def all_to_all(
        x: torch.Tensor, group: Group, out: Sequence[int] | None = None, given: Sequence[int] | None = None
    ) -> torch.Tensor:
        if given is None:
            _divides(x, 0, group)
        return x if group.size == 1 else transport.all_to_all(x, group, out, given)

    def permute(x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
        if group.size == 1:
            return x if (0, 0) in pairs else torch.zeros_like(x)
        return transport.permute(x, pairs, group)

    def exchange(sends: Sequence[Send], receives: Sequence[Receive], group: Group) -> _Arrived:
        return _Arrived(transport.exchange(sends, receives, group))

    def shard(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        _divides(x, dim, group)
        return x if group.size == 1 else transport.shard(x, dim, group)

    return Ops(all_reduce_, broadcast_, all_gather, reduce_scatter, all_to_all, permute, exchange, shard)


def _divides(x: torch.Tensor, dim: int, group: Group) -> None:
    if x.shape[dim] % group.size:
        raise ValueError(
            f"{tuple(x.shape)} cannot be cut equally among the {group.size} ranks of {group.name!r} "
            f"along dimension {dim}"
        )
