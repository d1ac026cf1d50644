"""HLO text as torch_xla lowers it, read: operations, FLOPs, collectives.

Room audit/. Standard library only. The text is the graph before XLA's passes, in an order that can be run as it stands.
Proof: tests/audit/test_hlo.py.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

__all__ = ["COLLECTIVES", "Collective", "Graph", "Operation", "Shape"]

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

ITEMSIZE = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}  # fmt: skip

_LINE = re.compile(r"^\s*(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^%(?P<name>[\w.\-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}")
_REDUCER = re.compile(r"to_apply=%([\w.\-]+)")
_DIMENSIONS = re.compile(r"[ ,]dimensions=\{([\d,]*)\}")


@dataclass(frozen=True)
class Shape:
    """One array: its dtype in XLA's name and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * ITEMSIZE.get(self.dtype, 4)


@dataclass(frozen=True)
class Operation:
    """One line of the entry computation; a tuple has several shapes."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def batched(self) -> bool:
        """Is it many products at once, as attention's of each head?"""
        return self.opcode == "dot" and re.search(r"lhs_batch_dims=\{\d", self.attributes) is not None


@dataclass(frozen=True)
class Collective:
    """One transfer among ranks.

    kind    an opcode of COLLECTIVES
    dtype   of what is sent
    groups  replica groups, or source and target pairs, as ranks of the world
    whole   bytes of the undivided tensor: what an all-gather has at its end, a reduce-scatter at its start
    how     what else both ends have to agree on: the reduction, the dimension
    """

    kind: str
    dtype: str
    groups: tuple[tuple[int, ...], ...]
    whole: int
    how: str = ""

    @property
    def size(self) -> int:
        """Ranks of a group."""
        return 2 if self.kind == "collective-permute" else max(map(len, self.groups), default=1)

    @property
    def received(self) -> int:
        """Bytes that a rank receives at least: n (t - 1) / t, an all-reduce twice that (ring or tree alike)."""
        share = self.whole * (self.size - 1) // self.size
        return {"all-reduce": 2 * share, "collective-permute": self.whole}.get(self.kind, share)

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The group that a rank is in, () for none."""
        return next((group for group in self.groups if rank in group), ())


class Graph:
    """One lowered graph; its text is read when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(_operations(self.text))

    @cached_property
    def by_name(self) -> dict[str, Operation]:
        return {one.name: one for one in self.operations}

    @cached_property
    def digest(self) -> str:
        """Of the program, without the number in the module's name: equal for ranks that run one program."""
        return hashlib.sha256(re.sub(r"IrToHlo\.\d+", "IrToHlo", self.text).encode()).hexdigest()

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(one.opcode for one in self.operations)

    @cached_property
    def dtypes(self) -> Counter[str]:
        """Bytes of results by dtype."""
        found: Counter[str] = Counter()
        for one in self.operations:
            for shape in one.shapes:
                found[shape.dtype] += shape.bytes
        return found

    def parameters(self) -> list[Shape]:
        """What the graph is given: weights, optimizer state, batches, numbers of the step."""
        return [one.shapes[0] for one in self.operations if one.opcode == "parameter"]

    @cached_property
    def flops(self) -> int:
        """Of its matrix products, a multiply-add counted as two: 2 x elements of the result x contracted elements."""
        return sum(self._flops(one) for one in self.operations if one.opcode == "dot")

    @cached_property
    def product_bytes(self) -> int:
        """Bytes that matrix products read and write, each operand once: what HBM has to move at least.

        Batched products that hand something on, element by element, can be one kernel, which keeps attention's scores
        and a block's keys, or experts' hidden values, on the chip: of them only weights count.
        """
        dots = [(one.name, *one.operands) for one in self.operations if one.opcode == "dot"]
        names = (name for dot in dots for name in dot if self._passed.isdisjoint(dot) or self._is_given(name))
        return sum(self.by_name[name].bytes for name in names)

    def _is_given(self, name: str) -> bool:
        """Is it a parameter of the graph, or one moved, cut or cast?"""
        one = self.by_name[name]
        while len(one.operands) == 1:
            one = self.by_name[one.operands[0]]
        return one.opcode == "parameter"

    @cached_property
    def _passed(self) -> frozenset[str]:
        """Results of batched products, and what is made of them element by element, that other ones read."""
        made: set[str] = set()
        for one in self.operations:
            if one.batched or any(name in made for name in self._elementwise(one)):
                made.add(one.name)
        passed: set[str] = set()
        for one in reversed(self.operations):
            if one.batched:
                passed.update(made.intersection(one.operands))
            elif one.name in passed:
                passed.update(made.intersection(self._elementwise(one)))
        return frozenset(passed)

    def _elementwise(self, one: Operation) -> tuple[str, ...]:
        """The operands that have an element for each of the result's."""
        if one.opcode in ("dot", *COLLECTIVES) or len(one.shapes) != 1:
            return ()
        elements = one.shapes[0].elements
        return tuple(name for name in one.operands if [s.elements for s in self.by_name[name].shapes] == [elements])

    def _flops(self, one: Operation) -> int:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        left = self.by_name[one.operands[0]].shapes[0].dims
        dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
        return 2 * one.shapes[0].elements * math.prod(left[dim] for dim in dims)

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """In the order of the text."""
        return tuple(self._collective(one) for one in self.operations if one.opcode in COLLECTIVES)

    def _collective(self, one: Operation) -> Collective:
        # torch_xla hands a token along with some, a scalar beside the tensors: it is no payload.
        operands = [shape for name in one.operands for shape in self.by_name[name].shapes]
        given = [shape for shape in operands if shape.dims] or operands[:1]
        sent = sum(shape.bytes for shape in given)
        groups = _groups(one.attributes)
        whole = sent * max(map(len, groups), default=1) if one.opcode == "all-gather" else sent
        return Collective(one.opcode, given[0].dtype, groups, whole, self._how(one))

    def _how(self, one: Operation) -> str:
        reducer, dims = _REDUCER.search(one.attributes), _DIMENSIONS.search(one.attributes)
        said = [self._roots[reducer[1]]] if reducer else []
        return " ".join([*said, *([f"dim {dims[1]}"] if dims else [])])

    @cached_property
    def _roots(self) -> dict[str, str]:
        """The last opcode of each computation but the entry: what a reduction adds up by."""
        return dict(_roots(self.text))


def _roots(text: str) -> Iterator[tuple[str, str]]:
    name = ""
    for line in text.partition("\nENTRY ")[0].splitlines():
        if opened := _COMPUTATION.match(line):
            name = opened["name"]
        elif (found := _LINE.match(line)) and found["root"]:
            yield name, found["opcode"]


def _operations(text: str) -> Iterator[Operation]:
    # A step of a large model has the same few shapes a hundred thousand times.
    shapes_of = lru_cache(maxsize=None)(_shapes)
    inside = False
    for line in text.splitlines():
        if line.startswith("ENTRY "):
            inside = True
        elif inside and line.startswith("}"):
            return
        elif inside and (found := _LINE.match(line)):
            rest, opcode = line[found.end() :], found["opcode"]
            end = _end_of_operands(rest)
            if opcode in ("constant", "parameter"):  # what it holds, or its number
                yield Operation(found["name"], opcode, shapes_of(found["shape"]), (), rest)
            else:
                operands = tuple(_OPERAND.findall(rest[:end]))
                yield Operation(found["name"], opcode, shapes_of(found["shape"]), operands, rest[end:])


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(dim) for dim in dims.split(",") if dim)) for dtype, dims in _SHAPE.findall(text)
    )


def _end_of_operands(rest: str) -> int:
    end = rest.find(")")
    if "(" not in rest[:end]:  # no operand is a tuple
        return end
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(rest)


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    found = _GROUPS.search(attributes) or _PAIRS.search(attributes)
    if found:
        return tuple(tuple(int(rank) for rank in one.split(",")) for one in re.findall(r"\{([\d,]+)\}", found[1]))
    if iota := _IOTA.search(attributes):
        return _from_iota(int(iota[1]), int(iota[2]), iota[3], iota[4])
    return ()


def _from_iota(count: int, size: int, dims: str, order: str | None) -> tuple[tuple[int, ...], ...]:
    """XLA's short form [groups,size]<=[dims]T(order): the ranks 0, 1, .. in that shape, transposed, cut."""
    shape = [int(dim) for dim in dims.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else list(range(len(shape)))
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    ranks = [0]
    for axis in axes:
        ranks = [rank + step * strides[axis] for rank in ranks for step in range(shape[axis])]
    return tuple(tuple(ranks[group * size : (group + 1) * size]) for group in range(count))
