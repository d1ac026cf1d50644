"""Do ranks that wait for each other lower the same collectives in the same order?

Room audit/. Standard library only. A collective that one rank of a group has and another has not, or has later, is a
run that stands still; so is a circle of ranks of which each waits for the next. Proof: tests/audit/test_deadlock.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest

from nxdt_nemo.audit.hlo import Collective

__all__ = ["Mismatch", "compared", "mismatches"]


@dataclass(frozen=True)
class Seen:
    """A collective as a rank sees it: what the members of its group have to agree on."""

    kind: str
    how: str
    dtype: str
    group: tuple[int, ...]
    whole: int

    def __str__(self) -> str:
        """In words."""
        how = f" ({self.how})" if self.how else ""
        return f"{self.kind}{how} of {self.whole} bytes of {self.dtype} over ranks {_listed(self.group)}"


class Mismatch(Exception):
    """The first place where ranks part, in words."""


def mismatches(
    ranks: Mapping[int, Sequence[Collective]], stages: Mapping[int, int] | None = None
) -> Iterator[Mismatch]:
    """The first difference of each pair of ranks, in what concerns both: groups that hold the two of them; of one
    pipeline stage, also what the one's program has the other all-reduce. If there is none, ranks that wait for each
    other in a circle.

    ranks   each lowered rank's collectives, in order
    stages  their pipeline stages; default: one
    """
    stages = stages or {}
    found = False
    for one, other in combinations(sorted(ranks), 2):
        if ranks[one] == ranks[other]:
            continue
        same_stage = stages.get(one, 0) == stages.get(other, 0)
        words = _parting(ranks, one, other) or (_contradiction(ranks, one, other) if same_stage else "")
        if words:
            found = True
            yield Mismatch(words)
    if not found and (waiting := _waiting({rank: [*_seen(each, rank)] for rank, each in ranks.items()})):
        heads = ", ".join(f"rank {rank} for {head}" for rank, head in waiting.items())
        yield Mismatch(f"ranks wait for each other in a circle: {heads}")


def _parting(ranks: Mapping[int, Sequence[Collective]], one: int, other: int) -> str:
    """Where the two part in the collectives that both are in, "" if nowhere."""
    pairs = zip_longest(_shared(ranks[one], one, other), _shared(ranks[other], other, one))
    for place, (left, right) in enumerate(pairs, 1):
        if left != right:
            return (
                f"collective {place} of those that ranks {one} and {other} are both in: "
                f"rank {one} has {left or 'none'}, rank {other} has {right or 'none'}"
            )
    return ""


def _contradiction(ranks: Mapping[int, Sequence[Collective]], one: int, other: int) -> str:
    """What a rank's program has another all-reduce that does not, "" if nothing: each text names the groups of the
    whole world, and ranks of a stage, whether they share a group or not, run one program. The other may do more: a
    group of a script's own is not known to the rest. Only an all-reduce names no groups but those that there are: what
    gathers has the rest of the world in groups that stand for none (runtime/xla/in_graph.py)."""
    for teller, doer in ((one, other), (other, one)):
        own = _seen(ranks[doer], doer)
        for told in _seen(ranks[teller], doer):
            if told.kind == "all-reduce" and len(told.group) > 1 and told not in own:  # as far as the iterator is
                return f"by the program of rank {teller}, rank {doer} has {told}; it has none there"
    return ""


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
        members = [rank for rank in head.group if rank in ranks]
        if all(_head(ranks, done, rank) == head for rank in members):
            for rank in members:
                done[rank] += 1
            ready += members
    return {rank: head for rank in ranks if (head := _head(ranks, done, rank)) is not None}


def _head(ranks: Mapping[int, Sequence[Seen]], done: Mapping[int, int], rank: int) -> Seen | None:
    return ranks[rank][done[rank]] if done[rank] < len(ranks[rank]) else None


def _shared(found: Sequence[Collective], rank: int, peer: int) -> Iterator[Seen]:
    return (one for one in _seen(found, rank) if peer in one.group)


def _seen(found: Sequence[Collective], rank: int) -> Iterator[Seen]:
    """Those that a rank is in."""
    for one in found:
        if one.kind == "collective-permute":
            group = _linked(one.groups, rank)
        else:
            group = one.group_of(rank)
        if rank in group:
            yield Seen(one.kind, one.how, one.dtype, group, one.whole)


def _linked(pairs: Sequence[tuple[int, ...]], rank: int) -> tuple[int, ...]:
    """The ranks that a chain of source and target pairs leads to: a program names those of the whole world."""
    found, waiting = set[int](), [rank] if any(rank in pair for pair in pairs) else []
    while waiting:
        here = waiting.pop()
        found.add(here)
        waiting += {end for pair in pairs if here in pair for end in pair} - found
    return tuple(sorted(found))


def _listed(group: Sequence[int]) -> str:
    return ",".join(map(str, group)) if len(group) <= 8 else f"{group[0]},{group[1]}..{group[-1]} ({len(group)} ranks)"
