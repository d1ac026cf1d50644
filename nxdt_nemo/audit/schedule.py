"""How many bytes live at once in a lowered step, run in an order that keeps few alive.

Room audit/. Standard library only. torch_xla prints a graph by its results: the sums of weight gradients last, long
after their products could have been made, so that the text's order keeps what those products read. A compiler makes an
order of its own; here it is XLA's list scheduler for memory: of the operations whose inputs are there, the one that
frees most goes first. Barriers are operations, and so hold what is recomputed back.

What memory is: a product, a collective, a reduction, and an elementwise operation that several others read or that a
product or a collective reads. An elementwise operation with one reader is fused into it; broadcasts, casts, slices and
transpositions are made where they are read, and what spreads little over much; gradients that add up do so one by one;
what is made several times of the same values is made once. Elementwise results take the place
of what they read last. Parameters live all along; results of the graph take the places of parameters of their shapes,
as far as there are any, and the others have places of their own from the beginning, as buffers of a result have.
Proof: tests/audit/test_schedule.py, which also has the bytes of XLA:CPU's own schedule.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nxdt_nemo.audit.hlo import COLLECTIVES, Operation, Shape

__all__ = ["peak_bytes"]

KEPT = frozenset((*COLLECTIVES, "dot", "reduce", "gather", "scatter", "concatenate", "custom-call", "rng", "sort",
                  "rng-bit-generator", "reduce-window", "dynamic-update-slice", "batch-norm-training",
                  "batch-norm-grad"))  # fmt: skip
FUSES = frozenset(("reduce", "scatter", "gather"))  # of KEPT: what takes an elementwise operation in
MOVES = frozenset(("reshape", "transpose", "broadcast", "bitcast", "slice", "get-tuple-element", "tuple",
                   "opt-barrier", "convert", "reverse"))  # fmt: skip
GIVEN = frozenset(("constant", "iota", "parameter"))
APART = frozenset((*COLLECTIVES, "parameter", "opt-barrier", "custom-call", "rng", "rng-bit-generator"))
"""What stands several times and is made several times."""
SPREAD = 4
"""How many times larger than what it is made of a value is that is rather made again than kept."""


def peak_bytes(operations: Sequence[Operation]) -> int:
    """The most bytes at once: of the list schedule, or of the text's order where that has less."""
    plan = _plan(_distinct(operations))
    return min(_peak(plan, _list(plan)), _peak(plan, range(len(plan.operations))))


def _distinct(operations: Sequence[Operation]) -> list[Operation]:
    """Without those that make once more what an earlier one makes, as every compiler leaves them out: each layer and
    micro-batch makes its own cosines of the same angles. What is drawn, sent or held back is made as often as it
    stands there."""
    kept, same = list[Operation](), dict[str, str]()
    made: dict[tuple[str, tuple[Shape, ...], tuple[str, ...], str], str] = {}
    for one in operations:
        operands = tuple(same.get(name, name) for name in one.operands)
        if one.opcode not in APART and "{...}" not in one.attributes:  # a constant whose numbers were left out
            first = made.setdefault((one.opcode, one.shapes, operands, one.attributes), one.name)
            if first != one.name and one is not operations[-1]:
                same[one.name] = first
                continue
        kept.append(replace(one, operands=operands) if operands != one.operands else one)
    return kept


@dataclass(frozen=True)
class _Plan:
    """Operations by number, the graph's result the last. reads: whose memory each reads, none for what has none of its
    own; results: what the graph gives."""

    operations: Sequence[Operation]
    operands: list[list[int]]
    readers: list[list[int]]
    own: list[bool]
    reads: list[frozenset[int]]
    results: frozenset[int]

    def elementwise(self, index: int) -> bool:
        return self.operations[index].opcode not in KEPT


def _plan(operations: Sequence[Operation]) -> _Plan:
    place = {one.name: index for index, one in enumerate(operations)}
    operands = [[place[name] for name in one.operands] for one in operations]
    readers: list[list[int]] = [[] for _ in operations]
    for index, given in enumerate(operands):
        for source in given:
            readers[source].append(index)
    own = [_has_memory(index, operations, readers) for index in range(len(operations))]
    sources = _sources(operations, operands, readers, own)
    nothing: frozenset[int] = frozenset()
    reads = [nothing.union(*(sources[given] for given in operands[index])) if own[index] else nothing
             for index in range(len(operations))]  # fmt: skip
    return _Plan(operations, operands, readers, own, reads, sources[-1])


def _has_memory(index: int, operations: Sequence[Operation], readers: list[list[int]]) -> bool:
    opcode = operations[index].opcode
    if opcode in KEPT:
        return True
    if opcode in MOVES or opcode in GIVEN:
        return False
    found, of_the_graph = _read_by(index, operations, readers)
    return of_the_graph or len(found) != 1 or (found[0] in KEPT and found[0] not in FUSES)


def _read_by(index: int, operations: Sequence[Operation], readers: list[list[int]]) -> tuple[list[str], bool]:
    """Opcodes of what reads it, through what moves only; and whether the graph gives it."""
    seen, waiting, found = set[int](), [index], list[str]()
    while waiting:
        for reader in readers[waiting.pop()]:
            if reader in seen:
                continue
            seen.add(reader)
            if operations[reader].opcode in MOVES:
                waiting.append(reader)
            else:
                found.append(operations[reader].opcode)
    return found, len(operations) - 1 in seen


def _sources(
    operations: Sequence[Operation], operands: list[list[int]], readers: list[list[int]], own: list[bool]
) -> list[frozenset[int]]:
    """Whose memory each value is made of: what moves or is fused has its operands', a part of a tuple that part's.

    Changes `own`: what is made of constants alone has none, nor what spreads little over much (labels, compared with
    each row of the vocabulary): it is made where it is read. A sum has that is all that reads its terms."""
    nothing: frozenset[int] = frozenset()

    def alone(source: int) -> bool:
        seen, of_the_graph = _read_by(source, operations, readers)
        return own[source] and len(seen) == 1 and not of_the_graph

    def spread(index: int, sources: frozenset[int]) -> bool:
        if not sources or operations[index].bytes < SPREAD * sum(operations[source].bytes for source in sources):
            return not sources
        opcodes, of_the_graph = _read_by(index, operations, readers)
        return not of_the_graph and (KEPT - FUSES).isdisjoint(opcodes)

    found, parts = list[frozenset[int]](), dict[int, list[frozenset[int]]]()
    for index, one in enumerate(operations):
        given = operands[index]
        mine = nothing.union(*(found[source] for source in given))
        if one.opcode == "parameter":
            mine = frozenset((index,))
        elif one.opcode == "tuple":  # as a whole all of them
            parts[index] = [found[source] for source in given]
        elif one.opcode == "opt-barrier" and given[0] in parts:
            parts[index] = parts[given[0]]
        elif one.opcode == "get-tuple-element" and given[0] in parts:
            number = re.search(r"index=(\d+)", one.attributes)
            mine = parts[given[0]][int(number[1])] if number else mine
        elif own[index] and one.opcode not in KEPT and spread(index, mine):
            own[index] = False
        elif own[index]:
            mine = frozenset((index,))
        elif one.opcode == "add" and len(mine) > 1 and all(alone(source) for source in mine):
            own[index], mine = True, frozenset((index,))  # gradients that add up: not kept till the last is there
        found.append(mine)
    return found


def _list(plan: _Plan) -> list[int]:
    """XLA's list scheduling: always what frees most, or takes least."""
    count = len(plan.operations)
    size, dead = [one.bytes for one in plan.operations], _uses(plan, range(count))
    lasting = [one.opcode == "parameter" for one in plan.operations]
    readers: list[list[int]] = [[] for _ in range(count)]
    for index in range(count):
        for source in plan.reads[index]:
            readers[source].append(index)

    def cost(index: int) -> int:
        if not plan.own[index]:
            return -(1 << 62)
        freed = sum(size[source] for source in plan.reads[index] if dead[source] == 1 and not lasting[source])
        return size[index] - freed

    waits = [len(given) for given in plan.operands]
    costs = {index: cost(index) for index in range(count) if not waits[index]}
    heap = [(value, index) for index, value in costs.items()]
    heapq.heapify(heap)
    order, done = list[int](), [False] * count
    while heap:
        value, index = heapq.heappop(heap)
        if done[index] or costs[index] != value:
            continue  # it has become cheaper since
        done[index] = True
        order.append(index)
        last_readers = list[int]()
        for source in plan.reads[index]:
            dead[source] -= 1
            if dead[source] == 1:
                last_readers += readers[source]
        ready = list[int]()
        for reader in plan.readers[index]:
            waits[reader] -= 1
            if not waits[reader]:
                ready.append(reader)
        for reader in (*ready, *(one for one in last_readers if not waits[one] and not done[one])):
            costs[reader] = cost(reader)
            heapq.heappush(heap, (costs[reader], reader))
    return order


def _uses(plan: _Plan, order: Iterable[int]) -> list[int]:
    """How many read each operation's memory, the graph's end included."""
    found = [0] * len(plan.operations)
    for index in order:
        for source in plan.reads[index]:
            found[source] += 1
    for index in plan.results:
        found[index] += 1
    return found


def _peak(plan: _Plan, order: Sequence[int]) -> int:
    """Bytes that live at once, at most, in this order."""
    operations = plan.operations
    parameters = {index for index, one in enumerate(operations) if one.opcode == "parameter"}
    more, left = _beyond(plan, parameters), _uses(plan, order)
    live = peak = sum(operations[index].bytes for index in parameters | more)
    there = more | {index for index in plan.results - parameters if plan.elementwise(index)}
    for index in order:
        if not plan.own[index]:
            continue
        freed = 0
        for source in plan.reads[index]:
            left[source] -= 1
            if not left[source] and source not in parameters:
                freed += operations[source].bytes
        elementwise = plan.elementwise(index)
        taken = 0 if index in there else operations[index].bytes
        if elementwise:  # where an operand was
            live += taken - min(freed, taken)
            freed -= min(freed, taken)
        else:
            live += taken
        peak = max(peak, live)
        live -= freed + (taken if not left[index] else 0)
    return peak


def _beyond(plan: _Plan, parameters: set[int]) -> set[int]:
    """Results that have no parameter's place, one of the same shape that is no result itself: they have their own from
    the beginning."""
    free = Counter(plan.operations[index].shapes for index in parameters - plan.results)
    found = set[int]()
    for index in sorted(plan.results - parameters):
        shapes = plan.operations[index].shapes
        free[shapes] -= 1
        if free[shapes] < 0:
            found.add(index)
    return found
