"""The table of raw collectives that a lane supplies.

Room runtime/. No autograd here: collectives.py adds it, counting.py swaps the table's functions.
Imports torch for type checking only. Proof: tests/runtime/test_collectives.py, test_counting.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from nxdt_nemo.runtime.groups import Group

__all__ = ["Arriving", "Ops", "Receive", "Send", "equal_part"]

Send = tuple["torch.Tensor", int]
"""A tensor and the group rank that gets it."""
Receive = tuple[Sequence[int], "torch.dtype", int]
"""Shape and dtype of a tensor, and the group rank that it comes from."""


class Arriving(Protocol):
    """Point-to-point transfers under way."""

    def wait(self) -> list[torch.Tensor]:
        """The received tensors, in the order they were asked for, once all transfers are done."""


@dataclass(slots=True)
class Ops:
    """One lane's collectives. t is the group's size; a dim may be negative.

    all_reduce_(x, group, op)          x, reduced in place; op "sum", "avg", "max", "min" or a PremulSum
    broadcast_(x, source, group)       x, overwritten by that of group rank `source`
    all_gather(x, dim, group)          [.., t*n, ..] from [.., n, ..]
    reduce_scatter(x, dim, group)      [.., n, ..] from [.., t*n, ..], summed
    all_to_all(x, group, out, in)      rows in[j] to rank j, rows out[j] from rank j; None: equal parts
    permute(x, pairs, group)           x of the rank that is paired with this one as target, zeros if none
    exchange(sends, receives, group)   batched point-to-point, started; see Arriving
    shard(x, dim, group)               [.., n, ..] from [.., t*n, ..]: this rank's part
    """

    all_reduce_: Callable[[torch.Tensor, Group, Any], torch.Tensor]
    broadcast_: Callable[[torch.Tensor, int, Group], torch.Tensor]
    all_gather: Callable[[torch.Tensor, int, Group], torch.Tensor]
    reduce_scatter: Callable[[torch.Tensor, int, Group], torch.Tensor]
    all_to_all: Callable[[torch.Tensor, Group, Sequence[int] | None, Sequence[int] | None], torch.Tensor]
    permute: Callable[[torch.Tensor, Sequence[tuple[int, int]], Group], torch.Tensor]
    exchange: Callable[[Sequence[Send], Sequence[Receive], Group], Arriving]
    shard: Callable[[torch.Tensor, int, Group], torch.Tensor]


def equal_part(x: torch.Tensor, dim: int, group: Group) -> int:
    """n of [.., t*n, ..] along `dim`. Raises ValueError where it cannot be cut equally among the group's t ranks."""
    part, rest = divmod(x.shape[dim], group.size)
    if rest:
        raise ValueError(
            f"{tuple(x.shape)} cannot be cut equally among the {group.size} ranks of {group.name!r} "
            f"along dimension {dim}"
        )
    return part
