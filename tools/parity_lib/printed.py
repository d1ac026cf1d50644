"""Numbers that runs of other people's scripts print, compared."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["difference"]


def difference(found: Sequence[str] | Sequence[float], expected: Sequence[str] | Sequence[float]) -> float:
    """The largest relative difference, of as many steps as `found` has, counted from the end."""
    pairs = zip(found, expected[-len(found) :], strict=True)
    return max(abs(float(one) - float(other)) / abs(float(other)) for one, other in pairs)
