"""Calls and bytes of each collective, while somebody asks.

Room runtime/. Swaps the functions in a lane's table, so that nothing of this runs otherwise. What upstream
sends by torch.distributed itself is not seen: see traffic.py. Imports torch for type checking only.
Proof: tests/runtime/test_counting.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.select import current

if TYPE_CHECKING:
    from nxdt_nemo.runtime.ops import Ops

__all__ = ["Count", "Counts", "count_collectives"]

COUNTED = ("all_reduce_", "broadcast_", "all_gather", "reduce_scatter", "all_to_all", "permute", "exchange")


@dataclass
class Count:
    """calls, and bytes: the whole tensor's, before what an algorithm makes of it.

    That is the output of an all-gather, what is sent by an exchange, and the input of all others.
    """

    calls: int = 0
    bytes: int = 0


Counts = dict[tuple[str, str], Count]
"""By collective ("all_gather") and name of the group ("tp")."""


@contextmanager
def count_collectives(ops: Ops | None = None) -> Iterator[Counts]:
    """Count what this process's collectives do inside the block (of a lane's table; the current lane's if None)."""
    ops = ops or current().ops
    counts: Counts = {}
    before = {name: getattr(ops, name) for name in COUNTED}
    for name, function in before.items():
        setattr(ops, name, _counted(name, function, counts))
    try:
        yield counts
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def _counted(name: str, function: Callable[..., Any], counts: Counts) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        result = function(*args)
        group = next(arg for arg in args if isinstance(arg, Group))
        count = counts.setdefault((name, group.name), Count())
        count.calls += 1
        count.bytes += _bytes(name, args[0], result)
        return result

    return call


def _bytes(name: str, given: Any, result: Any) -> int:
    if name == "exchange":
        return sum(int(tensor.nbytes) for tensor, _ in given)
    return int((result if name == "all_gather" else given).nbytes)
