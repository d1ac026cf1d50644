"""What `python -X importtime` tells, by package: seconds of its modules' own code, and who first asked for it."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LINE = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|( *)(\S+)$")
DEEP = ("torch", "nemo")  # so large that their subpackages are told apart


class Import(NamedTuple):
    """A module: its own code's seconds, and the module during whose import it was loaded ("": no module's)."""

    name: str
    seconds: float
    asked_by: str


class Line(NamedTuple):
    """A package's part; asked_by is a module outside it that first asked for it."""

    package: str
    seconds: float
    modules: int
    asked_by: str


def read(log: str) -> list[Import]:
    """The modules in the order in which they were begun. Python writes a module after those that it imports.

    One that is written more than once (its package's import led to it, or it failed first) has the sum.
    """
    done: list[_Module] = []
    for line in log.splitlines():
        match = LINE.match(line)
        if match:
            depth = len(match[2]) // 2
            first = next((place for place, one in enumerate(done) if one.depth > depth), len(done))
            done[first:] = [_Module(depth, match[3], int(match[1]) / 1e6, done[first:])]
    imports: dict[str, Import] = {}
    for one in (one for module in done for one in _begun(module, "")):
        before = imports.get(one.name)
        imports[one.name] = one if before is None else before._replace(seconds=before.seconds + one.seconds)
    return list(imports.values())


class _Module(NamedTuple):
    depth: int
    name: str
    seconds: float
    imports: list[_Module]


def _begun(module: _Module, asked_by: str) -> Iterator[Import]:
    yield Import(module.name, module.seconds, asked_by)
    for one in module.imports:
        yield from _begun(one, module.name)


def medians(runs: list[list[Import]]) -> list[Import]:
    """The first run's modules with the medians of their seconds."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in (one for run in runs for one in run):
        seconds[one.name].append(one.seconds)
    return [one._replace(seconds=statistics.median(seconds[one.name])) for one in runs[0]]


def by_package(imports: Iterable[Import]) -> list[Line]:
    """Largest first."""
    packages: dict[str, list[Import]] = defaultdict(list)
    for one in imports:
        packages[_package(one.name)].append(one)
    lines = [
        Line(name, sum(one.seconds for one in parts), len(parts), _asked_by(name, parts))
        for name, parts in packages.items()
    ]
    return sorted(lines, key=lambda line: -line.seconds)


def _package(module: str) -> str:
    top, _, below = module.partition(".")
    return f"{top}.{below.partition('.')[0]}" if top in DEEP and below else top


def _asked_by(package: str, parts: list[Import]) -> str:
    return next((one.asked_by for one in parts if _package(one.asked_by) != package), "")
