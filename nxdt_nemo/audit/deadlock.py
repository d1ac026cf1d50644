"""Do ranks that wait for each other lower the same collectives in the same order?

Room audit/. Standard library only. A collective that one rank of a group has and another has not, or has later, is a
run that stands still; so is a circle of ranks of which each waits for the next. Proof: tests/audit/test_deadlock.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, zip_longest

from nxdt_nemo.audit.hlo import Collective

__all__ = ["Mismatch", "compared", "mismatches"]

Seen = tuple[str, str, tuple[int, ...], int]


class Mismatch(Exception):
    """The first place where ranks part, in words."""


def mismatches(ranks: Mapping[int, Sequence[Collective]]) -> Iterator[Mismatch]:
    """The first difference of each pair of ranks, in what concerns both: groups that hold the two of them. If there is
    none, ranks that wait for each other in a circle.

    ranks   each lowered rank's collectives, in order
    """
    found = False
    for one, other in combinations(sorted(ranks), 2):
        ours = [*_shared(ranks[one], one, other)]
        theirs = [*_shared(ranks[other], other, one)]
        for place, (left, right) in enumerate(zip_longest(ours, theirs)):
            if left != right:
                found = True
                yield Mismatch(
                    f"collective {place + 1} of those that ranks {one} and {other} are both in: "
                    f"rank {one} has {_words(left)}, rank {other} has {_words(right)}"
                )
                break
    if not found and (waiting := _waiting({rank: [*_seen(each, rank)] for rank, each in ranks.items()})):
        heads = ", ".join(f"rank {rank} for {_words(head)}" for rank, head in waiting.items())
        yield Mismatch(f"ranks wait for each other in a circle: {heads}")


def compared(ranks: Mapping[int, Sequence[Collective]]) -> int:
    """Pairs of ranks that are both in some collective: what mismatches has to compare."""
    return sum(
        any(_shared(ranks[one], one, other)) or any(_shared(ranks[other], other, one))
        for one, other in combinations(ranks, 2)
    )


def _waiting(ranks: Mapping[int, Sequence[Seen]]) -> dict[int, Seen]:
    """What each rank waits for when nothing moves any more, {} if all get to their end. A collective is done when it is
    the next of all ranks of its group; a rank that was not lowered is always there."""
    done = dict.fromkeys(ranks, 0)
    ready = [*ranks]
    while ready:
        head = _head(ranks, done, ready.pop())
        if head is None:
            continue
        members = [rank for rank in head[2] if rank in ranks]
        if all(_head(ranks, done, rank) == head for rank in members):
            for rank in members:
                done[rank] += 1
            ready += members
    return {rank: head for rank in ranks if (head := _head(ranks, done, rank)) is not None}


def _head(ranks: Mapping[int, Sequence[Seen]], done: Mapping[int, int], rank: int) -> Seen | None:
    return ranks[rank][done[rank]] if done[rank] < len(ranks[rank]) else None


def _shared(found: Sequence[Collective], rank: int, peer: int) -> Iterator[Seen]:
    return (one for one in _seen(found, rank) if peer in one[2])


def _seen(found: Sequence[Collective], rank: int) -> Iterator[Seen]:
    """Those that a rank is in."""
    for one in found:
        if one.kind == "collective-permute":
            group = tuple(sorted({end for pair in one.groups for end in pair}))
        else:
            group = one.group_of(rank)
        if rank in group:
            yield one.kind, one.dtype, group, one.whole


def _words(seen: Seen | None) -> str:
    if seen is None:
        return "none"
    kind, dtype, group, whole = seen
    ranks = ",".join(map(str, group)) if len(group) <= 8 else f"{group[0]},{group[1]}..{group[-1]} ({len(group)} ranks)"
    return f"{kind} of {whole} bytes of {dtype} over ranks {ranks}"
