"""What a source holds: for each logical tensor the boxes of it that lie in files, and how they are read.

Room checkpoint/ (leaf). Reading is lazy: a block of a mapped file is a view of the page cache until it is copied
into the array that is being written. May import numpy and this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from nxdt_nemo.checkpoint.boxes import Box, whole
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType, Raw, put
from nxdt_nemo.checkpoint.placement import Part, Stored
from nxdt_nemo.checkpoint.tensors import Kind
from nxdt_nemo.errors import UserError

__all__ = ["Array", "Block", "Catalog", "Move", "Reshaped", "Wanted", "collect"]


_BLOCK = 8 << 20  # bytes that are made at a time where an array may be written in parts


class Array(Protocol):
    """An array in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def place(self) -> str:
        """Where it is, for messages: the file and the key."""
        ...

    def read(self, box: Box) -> Raw:
        """The box's elements as bits (dtypes.py); a view of the mapped file where there is one. Never write to it."""
        ...


@dataclass(frozen=True)
class Block:
    """Elements `box` of a logical tensor are elements `at` of an array.

    `at` may have leading axes of size 1, and is transposed if `turned`.
    """

    box: Box
    array: Array
    at: Box
    turned: bool = False

    def read(self, box: Box) -> Raw:
        """Elements of the logical tensor, all of them inside self.box; shape box.size."""
        inner = box.moved(self.box.start, (0,) * len(box.start))
        if self.turned:
            inner = inner.turned()
        lead = len(self.at.start) - len(inner.start)
        start = tuple(a + b for a, b in zip(self.at.start[lead:], inner.start, strict=True))
        found = self.array.read(Box(self.at.start[:lead] + start, (1,) * lead + inner.size)).reshape(inner.size)
        return found.T if self.turned else found


@dataclass(frozen=True)
class Reshaped:
    """Elements `at` of another array, in another shape."""

    base: Array
    at: Box
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return self.base.dtype

    @property
    def place(self) -> str:
        return self.base.place

    def read(self, box: Box) -> Raw:
        return self.base.read(self.at).reshape(self.shape)[box.inside((0,) * len(self.shape))]


class Move(NamedTuple):
    """Elements `box` of a block's logical tensor go to `to` in the array that is written."""

    block: Block
    box: Box
    to: Box
    turned: bool

    def cut(self, box: Box) -> Move | None:
        """What of it goes to a box of the array, seen from the box."""
        both = self.to.meet(box)
        if both is None:
            return None
        zero = (0,) * len(both.start)
        inner = both.moved(self.to.start, zero)
        taken = (inner.turned() if self.turned else inner).moved(zero, self.box.start)
        return Move(self.block, taken, both.moved(box.start, zero), self.turned)


class _Blocks:
    """The blocks of one tensor in the order they were found, and a way to those of some rows: there may be thousands,
    and a part of an array wants few of them."""

    def __init__(self) -> None:
        self._by_box: dict[Box, Block] = {}
        self._rows: list[tuple[int, int, Block]] = []  # first row, place in the order, block; sorted
        self._tallest = 0

    def __iter__(self) -> Iterator[Block]:
        return iter(self._by_box.values())

    def put(self, block: Block) -> None:
        if block.box not in self._by_box:
            self._by_box[block.box] = block
            self._rows = []

    def near(self, box: Box) -> list[Block]:
        """Those that have rows of the box, and so all that meet it."""
        if not self._rows:
            self._rows = sorted((block.box.start[0], place, block) for place, block in enumerate(self))
            self._tallest = max(block.box.size[0] for block in self)
        low = bisect_left(self._rows, (box.start[0] - self._tallest + 1,))
        high = bisect_left(self._rows, (box.stop[0],))
        return [block for _, _, block in sorted(self._rows[low:high], key=itemgetter(1))]


class Catalog:
    """Blocks by kind and name."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Kind, str], _Blocks] = defaultdict(_Blocks)

    def kinds(self) -> set[Kind]:
        """The kinds of state that are there."""
        return {kind for kind, _ in self._blocks}

    def names(self, kind: Kind = "model") -> list[str]:
        """Logical tensors that are there, in the order in which they were found."""
        return [name for found, name in self._blocks if found == kind]

    def blocks(self, kind: Kind, name: str, box: Box | None = None) -> list[Block]:
        """All blocks of one, or those that have rows of a box."""
        found = self._blocks.get((kind, name))
        if found is None:
            return []
        return list(found) if box is None else found.near(box)

    def copy(self, kind: Kind, to: Kind) -> None:
        """Let another kind of state be the same arrays."""
        for name in self.names(kind):
            self._blocks[to, name] = self._blocks[kind, name]

    def rename(self, kind: Kind, to: Kind) -> None:
        """Let the arrays of one kind stand for those of another."""
        for name in self.names(kind):
            self._blocks[to, name] = self._blocks.pop((kind, name))

    def dtype(self, kind: Kind, name: str) -> DType:
        """The dtype of its first block."""
        return next(iter(self._blocks[kind, name])).array.dtype

    def add(self, kind: Kind, parts: Iterable[Part], array: Array, origin: Box, lead: tuple[int, ...] = ()) -> None:
        """An array whose elements are `origin` of a stored one that has these parts.

        lead  the array's index in its leading axes, before those of the stored one
        """
        ones = (1,) * len(lead)
        for part in parts:
            if cut := part.cut(origin):
                at = Box(lead + cut.at.start, ones + cut.at.size)
                self.put(kind, cut.name, Block(cut.box, array, at, cut.turned))

    def put(self, kind: Kind, name: str, block: Block) -> None:
        """One block. A box that is there already is a copy of it and is left out."""
        self._blocks[kind, name].put(block)

    def want(self, kind: Kind, stored: Stored, dtype: DType | None = None) -> Wanted:
        """An array as it is to be written. dtype None keeps the source's. Raises UserError as `moves` does."""
        moves = tuple(self.moves(kind, stored))
        if dtype is None:  # a rank may have nothing but rows that pad a vocabulary
            others = (block for part in stored.parts for block in self.blocks(kind, part.name))
            found = moves[0].block if moves else next(others, None)
            dtype = found.array.dtype if found else FLOAT32
        return Wanted(moves, stored.shape, dtype)

    def part(self, kind: Kind, name: str, box: Box) -> Wanted:
        """A box of a logical tensor."""
        moves = []
        for block in self.blocks(kind, name, box):
            if both := block.box.meet(box):
                moves.append(Move(block, both, both.moved(box.start, (0,) * len(box.start)), False))
        return Wanted(tuple(moves), box.size, self.dtype(kind, name))

    def moves(self, kind: Kind, stored: Stored) -> list[Move]:
        """What makes up an array. Raises UserError if elements of it are nowhere and are not padding."""
        found: list[Move] = []
        for part in stored.parts:
            covered = 0
            for block in self.blocks(kind, part.name, part.box):
                box = block.box.meet(part.box)
                if box is None:
                    continue
                covered += box.volume
                moved = box.moved(part.box.start, (0,) * len(box.start))
                moved = moved.turned() if part.turned else moved
                found.append(Move(block, box, moved.moved((0,) * len(moved.start), part.at.start), part.turned))
            if covered > part.box.volume:
                raise UserError(f"{kind} of {part.name} is there twice in parts that overlap", place=stored.key)
            if covered < part.box.volume and not stored.pads:
                reason = (
                    f"{part.box.volume - covered} of {part.box.volume} elements of {part.name} ({kind}) are nowhere"
                )
                raise UserError(reason, place=stored.key, fix="the source lacks a file or a tensor")
        return found


@dataclass(frozen=True)
class Wanted:
    """An array to be written, and what it is made of."""

    moves: tuple[Move, ...]
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> Raw:
        """The array, made now."""
        return collect(self.moves, self.shape, self.dtype)

    def pieces(self) -> Iterator[Raw]:
        """The array as runs of rows, each in the place of the one before: a large one is never there at once."""
        rows = max(1, _BLOCK * self.shape[0] // self.nbytes) if self.shape and self.nbytes else 0
        if not rows or rows >= self.shape[0] or len(self.moves) == 1:
            yield self.tensor()
            return
        # New memory would cost more than what goes there.
        place = np.empty((rows, *self.shape[1:]), self.dtype.raw)
        for begin in range(0, self.shape[0], rows):
            size = (min(rows, self.shape[0] - begin), *self.shape[1:])
            box = Box((begin,) + (0,) * (len(size) - 1), size)
            cut = [moved for move in self.moves if (moved := move.cut(box)) is not None]
            yield collect(cut, size, self.dtype, place[: size[0]])


def collect(moves: Sequence[Move], shape: tuple[int, ...], dtype: DType, place: Raw | None = None) -> Raw:
    """The array: a view of the source where one block is all of it, else a new tensor; zeros where nothing goes.

    place  a tensor of this shape to fill instead of a new one
    """
    if len(moves) == 1 and moves[0].to == whole(shape):
        found = _oriented(moves[0])
        if moves[0].block.array.dtype == dtype and found.flags.c_contiguous:
            return found
    filled = sum(move.to.volume for move in moves)
    made = np.empty(shape, dtype.raw) if place is None else place
    if filled != math.prod(shape):
        made.fill(0)
    for move in moves:
        index: Any = (*move.to.inside((0,) * len(shape)), ...)  # a view, of an array without axes too
        there = made[index]
        put(there, _oriented(move), move.block.array.dtype, dtype)
    return made


def _oriented(move: Move) -> Raw:
    found = move.block.read(move.box)
    return found.T if move.turned else found
