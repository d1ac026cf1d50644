"""What tools/test_megatron.py prints and writes."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from upstream_lib.megatron import SUITE
from upstream_lib.outcomes import KINDS, Suite
from upstream_lib.report import COLUMNS, last_line, lines
from upstream_lib.sources import MegatronSources

__all__ = ["Result", "as_markdown", "show"]

PACKAGES = ("megatron-core", "torch", "pytest")


@dataclass(frozen=True)
class Result:
    """What there is to say: the suite, files that have not run yet on so many ranks, when the others did, and the
    gigabytes that a file wants.
    """

    suite: Suite
    missing: Mapping[int, Sequence[str]]
    when: Sequence[str]
    wants: Callable[[str], int]


def show(found: Result, console: Console) -> None:
    """Counts, causes, each failure that has no reason, and the verdict."""
    suite = found.suite
    for title, header, rows in (
        ("megatron-core's unit tests through us", ("ranks", *COLUMNS.values(), "all"), _by_world(suite)),
        ("by folder", ("tests", *COLUMNS.values(), *_worlds(suite)), _counts(suite)),
        ("what does not pass", ("cause", "kind", "tests", "why"), _causes(suite)),
    ):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for test in suite.unexplained:
        console.print(f"UNEXPLAINED {test}: {last_line(suite.outcomes[test].text)}", style="red", markup=False)
    console.print(*_not_run(found), _verdict(suite), sep="\n", highlight=False)


def as_markdown(found: Result) -> str:
    """The file in docs/results."""
    suite = found.suite
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"""# megatron-core's own unit tests

`make test-megatron`, run from {found.when[0]} to {found.when[-1]} UTC, cpu lane, {platform.machine()}. Python
{platform.python_version()}, {versions}.

`{SUITE}` of Megatron-LM at {MegatronSources.TAG} (commit {MegatronSources.COMMIT[:12]}), unedited, with the installed
megatron.core, and one process group for each number of ranks. Without this backend none of them passes on a CPU: a
fixture that each test has asks for CUDA. [megatron_core.toml](../../tests/upstream/megatron_core.toml) says on how
many ranks each file runs, and has the reasons below. A test counts as passed if it does on every rank, and on every
number of ranks that its file runs on and that it does not skip itself on.

| ranks | {" | ".join((*COLUMNS.values(), "all"))} |
|{"---|" * (len(COLUMNS) + 2)}
{lines(_by_world(suite))}

The last row counts each test once. "Not applicable" are the tests that skip themselves and failures of that kind
below. {_verdict(suite)}
{"".join(f"{chr(10)}{line}{chr(10)}" for line in _not_run(found))}
## Causes

| cause | kind | tests | why |
|---|---|---|---|
{lines(_causes(suite))}

{chr(10).join(f"- {kind}: {meaning}" for kind, meaning in KINDS.items() if kind != "removed")}

A module that cannot be imported counts as one error, whatever is in it.

## What does not pass

{chr(10).join(_named(suite))}

## What skips itself

| tests | in their words |
|---|---|
{lines((str(number), text) for text, number in sorted(suite.skips().items()))}

## By folder

The last columns: passed / run on so many ranks.

| tests | {" | ".join((*COLUMNS.values(), *_worlds(suite)))} |
|{"---|" * (len(COLUMNS) + 1 + len(suite.worlds))}
{lines(_counts(suite))}
"""


def _by_world(found: Suite) -> Iterator[tuple[str, ...]]:
    for world in (*found.worlds, None):
        counts = found.counts("", world)
        yield "all" if world is None else str(world), *(str(counts[key]) for key in COLUMNS), str(counts.total())


def _not_run(found: Result) -> Iterator[str]:
    for world, files in found.missing.items():
        if files:
            sizes = {file: f" (wants {size} GB of memory)" if (size := found.wants(file)) else "" for file in files}
            yield f"Not run to their end on {_ranks(world)}: {', '.join(f'`{file}`{sizes[file]}' for file in files)}."


def _worlds(found: Suite) -> list[str]:
    return [_ranks(world) for world in found.worlds]


def _ranks(world: int) -> str:
    return f"{world} rank{'s' if world > 1 else ''}"


def _counts(found: Suite) -> Iterator[tuple[str, ...]]:
    for label, below in (*sorted({_folder(test) for test in found.outcomes}), ("all", SUITE)):
        counts = found.counts(below)
        worlds = [found.counts(below, world) for world in found.worlds]
        each = [f"{count['passed']} / {count.total()}" if count else "" for count in worlds]
        yield label, *(str(counts[key]) for key in COLUMNS), *each


def _folder(test: str) -> tuple[str, str]:
    """The folder below SUITE that holds a test, and how the ids of the tests in it start."""
    name, below, _ = test.removeprefix(f"{SUITE}/").partition("/")
    return (name, f"{SUITE}/{name}/") if below else ("test_*.py", f"{SUITE}/test_")


def _causes(found: Suite) -> Iterator[tuple[str, ...]]:
    for reason, tests in found.explained.items():
        if tests:
            yield reason.cause, reason.kind, str(len(tests)), reason.why


def _named(found: Suite) -> Iterator[str]:
    """By cause: how many of each file; each test where it is ours or upstream's to mend."""
    for reason, tests in found.explained.items():
        if reason.kind == "not applicable":
            files = Counter(_short(test.partition("::")[0]) for test in tests)
            named = [f"`{file}` ({number})" for file, number in sorted(files.items())]
        else:
            named = [f"`{_short(test)}`" for test in sorted(tests)]
        if named:
            yield f"- {reason.cause} ({reason.kind}): {', '.join(named)}"
    for test in found.unexplained:
        yield f"- **unexplained**: `{_short(test)}`"


def _short(test: str) -> str:
    return test.removeprefix(f"{SUITE}/")


def _verdict(found: Suite) -> str:
    return f"Unexplained: {len(found.unexplained)}."
