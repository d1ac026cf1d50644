"""How a stored array holds logical tensors: the one mapping, read in either direction.

Room checkpoint/ (leaf). A dialect is a table of rows; a row names a key and how its array is made of logical tensors:
    Same(a)            a, or this rank's slice of it
    Blocks(a, b)       [a; b]: gate over up; on each rank, of its slices
    Groups(q, k, v)    for each query group: its queries, its key, its value
with turned=True if the array is stored transposed. `Part` is what comes out: a box of a logical tensor and the
box of the stored array where it lies. May import the standard library and this room.
Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, NamedTuple, Self

from nxdt_nemo.checkpoint.boxes import Box, whole
from nxdt_nemo.checkpoint.layout import Layout, Shard
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.tensors import Logical, logical_of
from nxdt_nemo.errors import LayoutError

__all__ = [
    "Blocks",
    "Copied",
    "Dialect",
    "Groups",
    "How",
    "Pairs",
    "Part",
    "Row",
    "Rows",
    "Same",
    "Segment",
    "Stored",
    "chunks",
    "copied",
    "gated",
    "not_copied",
    "not_gated",
    "rows_of",
    "tied_and_split",
    "untied",
]


class Part(NamedTuple):
    """Elements `box` of tensor `name` lie at `at` in the stored array, transposed if `turned`."""

    name: str
    box: Box
    at: Box
    turned: bool = False

    def cut(self, box: Box) -> Part | None:
        """What of it lies in a box of the stored array, seen from the box; None if nothing does."""
        here = self.at.meet(box)
        if here is None:
            return None
        inner = here.moved(self.at.start, (0,) * len(here.start))
        inner = inner.turned() if self.turned else inner
        taken = inner.moved((0,) * len(inner.start), self.box.start)
        return Part(self.name, taken, here.moved(box.start, (0,) * len(here.start)), self.turned)


class Segment(NamedTuple):
    """size rows of a logical tensor along the axis that is cut."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class How(ABC):
    """How an array is made of logical tensors: patterns with {l} and {e}, all of one tensor-parallel axis."""

    names: tuple[str, ...]
    turned: bool = False

    def of(self, names: tuple[str, ...]) -> Self:
        """The same of other tensors."""
        made = copy(self)
        object.__setattr__(made, "names", names)
        return made

    @abstractmethod
    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        """Rows, in order, of rank `rank` of `ranks`, along the axis that tensor parallelism cuts (or axis 0)."""


@dataclass(frozen=True)
class Same(How):
    """The tensor itself. Each rank has the whole of it if its tensor-parallel axis is None."""

    def __init__(self, name: str, *, turned: bool = False) -> None:
        object.__setattr__(self, "names", (name,))
        object.__setattr__(self, "turned", turned)

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        return [_share(names[0], model, rank, ranks)]


@dataclass(frozen=True)
class Blocks(How):
    """Tensors one below the other: [gate; up], GPT-2's [q; k; v]."""

    def __init__(self, *names: str, turned: bool = False) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "turned", turned)

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        return [_share(name, model, rank, ranks) for name in names]


@dataclass(frozen=True)
class Groups(How):
    """Megatron's fused attention: for each query group its queries, its key and its value, D rows a head."""

    def __init__(self, q: str, k: str, v: str) -> None:
        object.__setattr__(self, "names", (q, k, v))
        object.__setattr__(self, "turned", False)

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        if model.groups % ranks:
            reason = f"tp={ranks} does not divide the {model.groups} key-value heads"
            raise LayoutError(
                reason, fix="use a divisor, or a format that is split by name, such as torch_dist at tp=1"
            )
        each, heads = model.groups // ranks, model.heads // model.groups * model.head_size
        return [
            segment
            for group in range(rank * each, (rank + 1) * each)
            for segment in (
                Segment(names[0], group * heads, heads),
                Segment(names[1], group * model.head_size, model.head_size),
                Segment(names[2], group * model.head_size, model.head_size),
            )
        ]


@dataclass(frozen=True)
class Pairs(How):
    """For each key-value head its key and its value, D rows each."""

    def __init__(self, k: str, v: str) -> None:
        object.__setattr__(self, "names", (k, v))
        object.__setattr__(self, "turned", False)

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        if model.groups % ranks:
            reason = f"tp={ranks} does not divide the {model.groups} key-value heads"
            raise LayoutError(reason, fix="use a divisor, or a format that copies heads: nxdt")
        each, size = model.groups // ranks, model.head_size
        heads = range(rank * each, (rank + 1) * each)
        return [Segment(name, head * size, size) for head in heads for name in names]


@dataclass(frozen=True)
class Copied(How):
    """A rank's key head and value head where there are more ranks than these, so that neighbouring ranks have copies.

    This backend's own: megatron-core refuses such a layout. Queries lie apart, in plain order.
    """

    def __init__(self, k: str, v: str) -> None:
        object.__setattr__(self, "names", (k, v))
        object.__setattr__(self, "turned", False)

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        if ranks % model.groups or model.heads % ranks:
            reason = f"tp={ranks} neither divides the {model.groups} key-value heads nor is a multiple of them"
            raise LayoutError(f"{reason} that divides {model.heads} heads", fix="use such a size")
        return [Segment(name, rank * model.groups // ranks * model.head_size, model.head_size) for name in names]


@dataclass(frozen=True)
class Rows(How):
    """Rows of several tensors in turn: the first row of each, then the second. Megatron's checkpoint_version 1."""

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "turned", False)

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        shares = [_share(name, model, rank, ranks) for name in names]
        return [Segment(share.name, share.start + at, 1) for at in range(shares[0].size) for share in shares]


def _share(name: str, model: Model, rank: int, ranks: int) -> Segment:
    logical = logical_of(name)
    size = logical.size(model)[logical.tp or 0]
    if logical.tp is None:
        return Segment(name, 0, size)
    if size % ranks:
        raise LayoutError(f"tp={ranks} does not divide {name} {list(logical.size(model))}", fix="use a divisor")
    return Segment(name, rank * (size // ranks), size // ranks)


def _always(model: Model, layout: Layout) -> bool:
    return True


def untied(model: Model, layout: Layout) -> bool:
    """When of a row: the output layer has a weight of its own."""
    return not model.tied


def tied_and_split(model: Model, layout: Layout) -> bool:
    """When of a row: the last stage has a copy of the embedding."""
    return model.tied and layout.pp > 1


def copied(model: Model, layout: Layout) -> bool:
    """When of a row: several ranks have a copy of the same key-value head."""
    return bool(model.groups % layout.tp)


def not_copied(model: Model, layout: Layout) -> bool:
    """When of a row: a rank has whole query groups."""
    return not copied(model, layout)


def gated(model: Model, layout: Layout) -> bool:
    """When of a row: the MLP's first matrix has a gate."""
    return model.gated


def not_gated(model: Model, layout: Layout) -> bool:
    """When of a row: it has none."""
    return not model.gated


@dataclass(frozen=True)
class Row:
    """A key of a dialect.

    key      with {l} and {e} for layer and expert, unless the array is stacked over them
    also     other spellings that are read; they are not written
    stacked  the array's leading axes count layers ("l"), or layers and experts ("le")
    zero     the key of layer 0, where it is another; in a key, {before} is the layer before and {last} the last one
    on       the pipeline stages that have it; `between`, the last encoder stage's end, before a T5's decoder layers
    when     which models and layouts have it
    """

    key: str
    how: How
    also: tuple[str, ...] = ()
    stacked: Literal["", "l", "le"] = ""
    on: Literal["layers", "first", "between", "last"] = "layers"
    when: Callable[[Model, Layout], bool] = field(default=_always)
    zero: str = ""

    @property
    def expert(self) -> bool:
        """True if the array is one expert's."""
        return "{e}" in self.how.names[0]

    @property
    def copy(self) -> bool:
        """True if the array is the output layer's copy of the embedding."""
        return self.on == "last" and self.how.names == ("embedding.word.weight",)

    @property
    def decoder(self) -> bool:
        """True if the array is of a decoder, where there is an encoder too."""
        return self.how.names[0].startswith("decoder")


@dataclass(frozen=True)
class Stored:
    """One array as a checkpoint's file holds it.

    key     its name there; `also` other names that it may have
    index   its place in the leading axes of a stacked array
    shape   without these axes
    parts   what it holds; elements outside of all parts are padding
    lead    the size of the leading axes
    spare   the rank has it and never uses it: it is written, and what a file has there is nothing
    """

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    row: Row
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    also: tuple[str, ...] = ()
    spare: bool = False

    @property
    def read(self) -> tuple[Part, ...]:
        """The parts that a file's array gives."""
        return () if self.spare else self.parts

    @property
    def pads(self) -> bool:
        """True if rows may be missing in the source: those that pad a vocabulary."""
        return any("V" in logical_of(part.name).shape for part in self.parts)

    def cut(self, box: Box) -> Stored:
        """The array of these elements alone."""
        parts = tuple(cut for part in self.parts if (cut := part.cut(box)) is not None)
        return replace(self, shape=box.size, parts=parts)


Dialect = tuple[Row, ...]


def rows_of(
    dialect: Dialect, model: Model, names: frozenset[str], shard: Shard, layout: Layout, *, local: bool = True
) -> Iterator[Stored]:
    """The arrays of one shard, in the dialect's order, which is that of upstream's parameters.

    names  the patterns of the logical tensors that the model has; rows that need others are left out
    local  keys count the shard's own layers and experts from 0
    """
    if model.decoder_layers and layout.pp > 1 and not layout.encoder:
        reason = f"pp={layout.pp}: stages of a model with an encoder and a decoder are not told apart"
        raise LayoutError(reason, fix="use pp=1, torch, or torch_dist, which is loaded at any layout")
    if model.relative_buckets and layout.encoder:
        reason = f"pp={layout.pp}: Megatron-LM runs no T5 in stages that has relative positions"
        raise LayoutError(reason, fix="use pp=1")
    rows = [row for row in dialect if names.issuperset(row.how.names) and row.when(model, layout)]
    inner = [row for row in rows if row.on == "layers"]
    encodes, decodes = not layout.encoder or shard.pp < layout.encoder, shard.pp >= layout.encoder

    def ends(on: str) -> Iterator[Stored]:
        return (_stored(row, model, shard, (), {}, local) for row in rows if row.on == on)

    if shard.first:
        yield from ends("first")
    yield from _layers([row for row in inner if not row.decoder], model, shard, shard.layers, local)
    if encodes and (decodes or shard.last):
        yield from ends("between")
    decoder = layout.decoder_of(model.decoder_layers, shard.pp)
    yield from _layers([row for row in inner if row.decoder], model, shard, decoder, local)
    for stored in ends("last") if shard.last else ():
        # A stage that has the embedding uses it for the output layer. An encoder's last stage has an output layer too.
        if (decodes or not stored.row.decoder) and not (shard.first and stored.row.copy):
            yield replace(stored, spare=not decodes)


def _layers(rows: Sequence[Row], model: Model, shard: Shard, layers: Sequence[int], local: bool) -> Iterator[Stored]:
    """The arrays of layers, one after the other; those of experts expert by expert."""
    for at, layer in enumerate(layers):
        for expert, group in groupby(rows, lambda row: row.expert):
            same = list(group)
            for place, number in enumerate(shard.experts) if expert else ((0, -1),):
                index = (layer, number) if expert else (layer,)
                places = {"l": at, "e": place} if expert else {"l": at}
                yield from (_stored(row, model, shard, index, places, local) for row in same)


def _stored(
    row: Row, model: Model, shard: Shard, index: tuple[int, ...], places: dict[str, int], local: bool
) -> Stored:
    numbers = dict(zip("le", index, strict=False))
    names = [name.format(**numbers) for name in row.how.names]
    rank, ranks = (shard.expert_tp, shard.expert_ranks) if row.expert else (shard.tp, shard.ranks)
    segments = row.how.segments(names, model, rank, ranks)
    shape, parts = _parts(segments, logical_of(names[0]), model, row.how.turned)
    layers = model.decoder_layers if row.decoder else model.layers
    lead = (layers, model.experts)[: len(row.stacked)] if row.stacked else ()
    spelled: dict[str, object] = {**(places if local else numbers), "last": model.layers - 1}
    if index:
        spelled["before"] = index[0] - 1
    pattern = row.zero if row.zero and index[:1] == (0,) else row.key
    return Stored(
        key=pattern.format(**spelled),
        shape=shape,
        parts=parts,
        row=row,
        index=index[: len(row.stacked)],
        lead=lead,
        also=tuple(key.format(**spelled) for key in row.also),
    )


def _parts(
    segments: Sequence[Segment], logical: Logical, model: Model, turned: bool
) -> tuple[tuple[int, ...], tuple[Part, ...]]:
    """The array's shape, and its parts: segments one after the other along the cut axis, the other axes whole."""
    axis, size = logical.tp or 0, list(logical.size(model))
    parts, at = [], 0
    for segment in segments:
        box, place = whole(size), whole(size)
        box = _with(box, axis, segment.start, segment.size)
        place = _with(place, axis, at, segment.size)
        parts.append(Part(segment.name, box, place.turned() if turned else place, turned))
        at += segment.size
    size[axis] = at
    return tuple(size[::-1] if turned else size), tuple(parts)


def _with(box: Box, axis: int, start: int, size: int) -> Box:
    starts, sizes = list(box.start), list(box.size)
    starts[axis], sizes[axis] = start, size
    return Box(tuple(starts), tuple(sizes))


def chunks(local: Stored, whole: Stored) -> list[Box]:
    """Where a rank's array lies in the array of all ranks: one box, or one for each part of a gated pair.

    One for each on a single rank too, where the two lie side by side: Megatron's distributed optimizer counts on it.
    """
    apart = isinstance(local.row.how, Blocks)
    boxes: list[Box] = []
    for part in local.parts:
        for other in whole.parts:
            both = part.box.meet(other.box) if part.name == other.name else None
            if both is None:
                continue
            moved = both.moved(other.box.start, (0,) * len(both.start))
            moved = moved.turned() if part.turned else moved
            box = moved.moved((0,) * len(moved.start), other.at.start)
            joined = _join(boxes[-1], box) if boxes and not apart else None
            boxes[-1:] = [joined] if joined else [*boxes[-1:], box]
    return boxes


def _join(a: Box, b: Box) -> Box | None:
    """One box of two that follow each other along an axis."""
    for axis in range(len(a.start)):
        rest = [i for i in range(len(a.start)) if i != axis]
        same = all(a.start[i] == b.start[i] and a.size[i] == b.size[i] for i in rest)
        if same and a.start[axis] + a.size[axis] == b.start[axis]:
            return _with(a, axis, a.start[axis], a.size[axis] + b.size[axis])
    return None
