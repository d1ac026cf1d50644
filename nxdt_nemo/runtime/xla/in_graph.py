"""Collectives inside the traced graph, with the replica groups of the whole world.

Room runtime/. Imports torch and torch_xla. Proof: tests/runtime/test_xla_world.py, tests/megatron/test_xla_lift.py.

One program for all ranks: the rank's place in a group is a value on the device (a parameter of the graph), never a
number in it, so ranks of one pipeline stage trace the same text. Layouts are not pinned: torch_xla makes of a pinned
all-gather an all-reduce of twice the bytes.

Between pipeline stages, which run different programs, a tensor goes by an all-gather over groups of two ranks, as
neuronx-distributed has it: a collective-permute names pairs of one program that all its ranks run, and its bytes on a
link are the same. A graph holds what a living tensor needs, and nobody needs what a send leaves on its own side: an
element of the last transfer lives on, which has all before it in its graph, as torch_xla's collectives follow each
other.

XLA wants each rank of the world in one replica group, groups of one size for what gathers: the ranks that a collective
does not concern are put in groups of their own, which name no transfer of theirs. neuronx-distributed's pairs of stages
cover the world too, its groups of tied weights do not. Its stages send at times of their own, so that members of one
group do not wait for another group of the list. Whether neuronx-cc and NeuronRT want more is not known: NOT RUN there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.gaps import PremulSum
from nxdt_nemo.runtime.groups import Group, completed
from nxdt_nemo.runtime.ops import Arriving, Ops, Receive, Send, equal_part

__all__ = ["Dialect", "Replicas", "in_graph"]

Groups = list[list[int]]


class Dialect(ABC):
    """How a collective is written into the graph; `groups` are replica groups of the world."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor, kind: str, scale: float, groups: Groups) -> torch.Tensor: ...

    @abstractmethod
    def all_gather(self, x: torch.Tensor, dim: int, groups: Groups) -> torch.Tensor: ...

    @abstractmethod
    def reduce_scatter(self, x: torch.Tensor, dim: int, groups: Groups) -> torch.Tensor: ...

    @abstractmethod
    def all_to_all(self, x: torch.Tensor, group: Group, groups: Groups) -> torch.Tensor: ...

    @abstractmethod
    def permute(self, x: torch.Tensor, pairs: Groups, group: Group) -> torch.Tensor: ...

    @abstractmethod
    def place(self, group: Group, device: torch.device) -> torch.Tensor:
        """This rank's place in the group, int64 [1], a parameter of the graph."""


class Replicas(Dialect):
    """One process a rank: torch_xla's own collectives."""

    def __init__(self) -> None:
        self._places: dict[tuple[Any, int], torch.Tensor] = {}

    def all_reduce(self, x: torch.Tensor, kind: str, scale: float, groups: Groups) -> torch.Tensor:
        reduced: torch.Tensor = torch_xla._XLAC._xla_all_reduce(kind, x, scale, groups, False)
        return reduced

    def all_gather(self, x: torch.Tensor, dim: int, groups: Groups) -> torch.Tensor:
        whole: torch.Tensor = xm.all_gather(x, dim, groups=groups, pin_layout=False)
        return whole

    def reduce_scatter(self, x: torch.Tensor, dim: int, groups: Groups) -> torch.Tensor:
        part: torch.Tensor = xm.reduce_scatter(
            xm.REDUCE_SUM, x, 1.0, dim, len(groups[0]), groups=groups, pin_layout=False
        )
        return part

    def all_to_all(self, x: torch.Tensor, group: Group, groups: Groups) -> torch.Tensor:
        rows: torch.Tensor = xm.all_to_all(x, 0, 0, group.size, groups=groups, pin_layout=False)
        return rows

    def permute(self, x: torch.Tensor, pairs: Groups, group: Group) -> torch.Tensor:
        moved: torch.Tensor = xm.collective_permute(x, pairs)
        return moved

    def place(self, group: Group, device: torch.device) -> torch.Tensor:
        key = (group.mesh, group.rank)
        if key not in self._places:
            self._places[key] = torch.tensor([group.rank]).to(device)
        return self._places[key]


def in_graph(dialect: Dialect) -> Ops:
    """A new table. Groups of one rank send nothing."""
    last: list[torch.Tensor] = []

    def all_reduce_(x: torch.Tensor, group: Group, op: Any = "sum") -> torch.Tensor:
        if isinstance(op, PremulSum):
            x.mul_(op.factor)
            op = "sum"
        if group.size == 1:
            return x
        if op == "avg" and not x.is_floating_point():  # a factor below 1 would be 0
            return x.copy_(dialect.all_reduce(x, "sum", 1.0, _groups(group)).div(group.size, rounding_mode="trunc"))
        kind, scale = ("sum", 1.0 / group.size) if op == "avg" else (op, 1.0)
        return x.copy_(dialect.all_reduce(x, kind, scale, _groups(group)))

    def broadcast_(x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
        if group.size == 1:
            return x
        here = (dialect.place(group, x.device) == source).view([1] * x.dim())
        sent = torch.where(here, x, torch.zeros_like(x))
        whole = dialect.all_reduce(sent.to(_SUMMED.get(x.dtype, x.dtype)), "sum", 1.0, _groups(group))
        return x.copy_(whole.to(x.dtype))

    def all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        return x if group.size == 1 else dialect.all_gather(x, dim % x.dim(), _even(group))

    def reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        equal_part(x, dim, group)
        return x if group.size == 1 else dialect.reduce_scatter(x, dim % x.dim(), _even(group))

    def all_to_all(
        x: torch.Tensor, group: Group, out: Sequence[int] | None = None, given: Sequence[int] | None = None
    ) -> torch.Tensor:
        if len({*(out or ()), *(given or ())}) > 1:
            raise LaneError(f"an all-to-all of {group.name!r} with unequal parts has no fixed shape to trace")
        equal_part(x, 0, group)
        return x if group.size == 1 else dialect.all_to_all(x, group, _even(group))

    def permute(x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
        if group.size == 1:
            return x if (0, 0) in pairs else torch.zeros_like(x)
        everyone = [
            [ranks[source], ranks[target]] for ranks in group.mesh if len(ranks) > 1 for source, target in pairs
        ]
        return dialect.permute(x, everyone, group)

    def exchange(sends: Sequence[Send], receives: Sequence[Receive], group: Group) -> Arriving:
        received, kept = _between_stages(dialect, sends, receives, group)
        last[:] = kept or last
        return _Arrived(received)

    def shard(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        part = equal_part(x, dim, group)
        if group.size == 1:
            return x
        dim = dim % x.dim()
        mine: torch.Tensor = x.unflatten(dim, (group.size, part)).index_select(dim, dialect.place(group, x.device))
        return mine.squeeze(dim)

    return Ops(all_reduce_, broadcast_, all_gather, reduce_scatter, all_to_all, permute, exchange, shard)


_SUMMED = {torch.bool: torch.int32}


def _groups(group: Group) -> Groups:
    """A group of a script's own knows itself only; the others' ranks reduce nothing."""
    return [list(ranks) for ranks in completed(group.mesh, dist.get_world_size())]


def _even(group: Group) -> Groups:
    """Groups of one size: what a gathering needs."""
    return _covering([list(ranks) for ranks in group.mesh if len(ranks) == group.size], group)


def _covering(groups: Groups, group: Group) -> Groups:
    """Groups of one size, and as many more as hold the rest of the world's ranks, ascending.

    Both ends of a transfer have the same ones: they follow from the mesh. Raises LaneError for a rest that cannot be
    divided.
    """
    size, world = len(groups[0]), dist.get_world_size()
    inside = {rank for ranks in groups for rank in ranks}
    rest = [rank for rank in range(world) if rank not in inside]
    if len(rest) % size:
        raise LaneError(
            f"{group.name!r} sends in groups of {size}, and the world's other {len(rest)} ranks make no such groups",
            fix=f"use a world of a multiple of {size} ranks",
        )
    return groups + [rest[start : start + size] for start in range(0, len(rest), size)]


def _pairs(group: Group, low: int, high: int) -> Groups:
    """The ranks in these two places of each pipeline; of neighbours in an even ring, every second pair of it, so that
    two lists serve all stages."""
    size, places = group.size, [(low, high)]
    if size % 2 == 0 and high - low in (1, size - 1):
        first = low if high - low == 1 else high
        places = [_pair(place % size, (place + 1) % size) for place in range(first, first + size, 2)]
    return _covering([[ranks[a], ranks[b]] for ranks in group.mesh if len(ranks) == size for a, b in places], group)


@dataclass(frozen=True)
class _Arrived:
    """Transfers that are in the graph."""

    received: list[torch.Tensor]

    def wait(self) -> list[torch.Tensor]:
        return self.received


def _between_stages(
    dialect: Dialect, sends: Sequence[Send], receives: Sequence[Receive], group: Group
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What arrives, and an element of the last transfer: a copy, as a view would keep all of it.

    Each tensor by an all-gather of two ranks, the one that receives giving zeros; in the order of the peers' ranks,
    lower pairs first, which both ends of each pair follow.
    """
    arrived: dict[int, torch.Tensor] = {}
    jobs: list[tuple[tuple[int, int], int, Callable[[], torch.Tensor]]] = []

    def job(peer: int, x: torch.Tensor, keep: int | None) -> Callable[[], torch.Tensor]:
        low, high = _pair(group.rank, peer)
        pairs = _pairs(group, low, high)

        def run() -> torch.Tensor:
            both = dialect.all_gather(x[None], 0, pairs)
            if keep is not None:
                arrived[keep] = both[0 if peer == low else 1]
            return both

        return run

    for tensor, peer in sends:
        jobs.append((_pair(group.rank, peer), 0 if group.rank < peer else 1, job(peer, tensor, None)))
    for index, (shape, dtype, peer) in enumerate(receives):
        zeros = torch.zeros(tuple(shape), dtype=dtype, device=torch_xla.device())
        jobs.append((_pair(group.rank, peer), 1 if group.rank < peer else 0, job(peer, zeros, index)))
    # Both ends of a pair: first what goes up, then what goes down.
    transfers = [run() for _, _, run in sorted(jobs, key=lambda one: one[:2])]
    return [arrived[index] for index in range(len(receives))], [both.flatten()[:1].clone() for both in transfers[-1:]]


def _pair(one: int, other: int) -> tuple[int, int]:
    return min(one, other), max(one, other)
