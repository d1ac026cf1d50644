"""Boxes: axis-aligned parts of a tensor, which is all that resharding moves.

Room checkpoint/ (leaf). May import the standard library. Proof: tests/checkpoint/test_boxes.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

__all__ = ["Box", "flat_boxes", "grid", "whole"]


class Box(NamedTuple):
    """Elements start[i] .. start[i] + size[i] of each axis i."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @property
    def stop(self) -> tuple[int, ...]:
        """The first index after the box, on each axis."""
        return tuple(start + size for start, size in zip(self.start, self.size, strict=True))

    def meet(self, other: Box) -> Box | None:
        """The elements in both boxes; None if there are none."""
        starts, sizes = [], []
        for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True):  # a plan's hottest loop
            low, high = (a if a > b else b), (a + n if a + n < b + m else b + m)
            if high <= low:
                return None
            starts.append(low)
            sizes.append(high - low)
        return Box(tuple(starts), tuple(sizes))

    def inside(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Slices that cut this box out of a tensor whose first element is at `origin`."""
        return tuple(
            slice(start - zero, start - zero + size)
            for start, size, zero in zip(self.start, self.size, origin, strict=True)
        )

    def moved(self, origin: Sequence[int], to: Sequence[int]) -> Box:
        """The box seen from a frame in which `origin` lies at `to`."""
        return Box(tuple(s - o + t for s, o, t in zip(self.start, origin, to, strict=True)), self.size)

    def turned(self) -> Box:
        """The same elements of the transposed tensor."""
        return Box(self.start[::-1], self.size[::-1])


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def flat_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[Box, int]]:
    """Elements begin .. end of a flattened tensor as boxes, each with the place in the range where it begins.

    A box covers a contiguous run: a part of the last axis, or whole trailing axes.
    """
    shape = tuple(shape)
    at = begin
    while at < end:
        run, axis = 1, len(shape)
        while axis and at % (run * shape[axis - 1]) == 0 and at + run * shape[axis - 1] <= end:
            axis -= 1
            run *= shape[axis]
        index = _unravel(at, shape)
        size = [1] * axis + list(shape[axis:])
        if axis:  # as many runs along the next axis as fit before its end, or the range's
            size[axis - 1] = min(shape[axis - 1] - index[axis - 1], (end - at) // run)
        yield Box(index, tuple(size)), at - begin
        at += math.prod(size)


def grid(shape: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Equal tiles of a tensor, counts[i] on axis i, each with its index."""
    tile = tuple(n // c for n, c in zip(shape, counts, strict=True))
    for index in product(*map(range, counts)):
        yield index, Box(tuple(i * n for i, n in zip(index, tile, strict=True)), tile)


def _unravel(at: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for n in reversed(shape):
        at, here = divmod(at, n)
        index.append(here)
    return tuple(reversed(index))
