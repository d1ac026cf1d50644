"""Do ranks that wait for each other lower the same collectives in the same order?

Room audit/. Standard library only. A collective that one rank of a group has and another has not, or has later, is a
run that stands still. Proof: tests/audit/test_deadlock.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, zip_longest

from nxdt_nemo.audit.hlo import Collective

__all__ = ["Mismatch", "mismatches"]

Seen = tuple[str, str, tuple[int, ...], int]


class Mismatch(Exception):
    """The first place where two ranks part, in words."""


def mismatches(ranks: Mapping[int, Sequence[Collective]]) -> Iterator[Mismatch]:
    """The first difference of each pair of ranks, in what concerns both: groups that hold the two of them.

    ranks   each lowered rank's collectives, in order
    """
    for one, other in combinations(sorted(ranks), 2):
        ours = [*_shared(ranks[one], one, other)]
        theirs = [*_shared(ranks[other], other, one)]
        for place, (left, right) in enumerate(zip_longest(ours, theirs)):
            if left != right:
                yield Mismatch(
                    f"collective {place + 1} of those that ranks {one} and {other} are both in: "
                    f"rank {one} has {_words(left)}, rank {other} has {_words(right)}"
                )
                break


def _shared(found: Sequence[Collective], rank: int, peer: int) -> Iterator[Seen]:
    for one in found:
        if one.kind == "collective-permute":
            group = tuple(sorted({end for pair in one.groups for end in pair}))
        else:
            group = one.group_of(rank)
        if rank in group and peer in group:
            yield one.kind, one.dtype, group, one.whole


def _words(seen: Seen | None) -> str:
    if seen is None:
        return "none"
    kind, dtype, group, whole = seen
    ranks = ",".join(map(str, group)) if len(group) <= 8 else f"{group[0]},{group[1]}..{group[-1]} ({len(group)} ranks)"
    return f"{kind} of {whole} bytes of {dtype} over ranks {ranks}"
