"""What tools/test_upstream.py prints and writes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from upstream_lib.outcomes import KINDS, Comparison, Side
from upstream_lib.runs import PLUGIN, SUITES

__all__ = ["COLUMNS", "as_markdown", "last_line", "lines", "show"]

COLUMNS = {"passed": "passed", "failed": "failed", "error": "errors", "not applicable": "not applicable"}
PACKAGES = ("nemo_toolkit", "megatron-core", "lightning", "torch", "pytest")


def show(found: Comparison, console: Console) -> None:
    """Counts side by side, causes, each remaining failure, and the verdict."""
    for title, header, rows in (
        ("NVIDIA's tests: stock / through us", ("tests", *COLUMNS.values()), _counts(found)),
        ("what does not pass", ("cause", "kind", "stock", "ours", "why"), _causes(found)),
    ):
        table = Table(title=title)
        for name in header:
            table.add_column(name)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for reason, tests in found.explained.items():
        for test in tests:
            console.print(f"{test}: {reason.cause} ({reason.kind})", markup=False, highlight=False, soft_wrap=True)
    for test in found.unexplained:
        console.print(f"UNEXPLAINED {test}: {last_line(found.ours[test].text)}", style="red", markup=False)
    for test in found.lost:
        console.print(f"LOST {test}: passed on stock", style="red", markup=False)
    console.print(_pytest_counts(found), _verdict(found), sep="\n", highlight=False)


def as_markdown(found: Comparison, command: str, stock_day: datetime) -> str:
    """The file in docs/results."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    named = "\n".join(_named(found))
    return f"""# NVIDIA's own tests

`{command}`, {datetime.now(UTC):%Y-%m-%d} (stock side run on {stock_day:%Y-%m-%d}), cpu lane, one process a side,
{platform.machine()}. Python {platform.python_version()}, {versions}.

The tests of the sdist of nemo_toolkit {version("nemo_toolkit")} (hash pinned), run with `--cpu` and
without a network. The sides differ by `-p {PLUGIN}` only.

| tests, stock / through us | {" | ".join(COLUMNS.values())} |
|{"---|" * (len(COLUMNS) + 1)}
{lines(_counts(found))}

"Not applicable" are the tests that skip themselves (no GPU, a package that is not here) and failures of that kind
below. As pytest counts:

{_pytest_counts(found)}

{_verdict(found)}

## Causes

| cause | kind | stock | ours | why |
|---|---|---|---|---|
{lines(_causes(found))}

{chr(10).join(f"- {kind}: {meaning}" for kind, meaning in KINDS.items())}

A module that cannot be imported counts as one error, whatever is in it: stock has fewer tests.

## What does not pass through us, test by test

{named}

## What skips itself through us

| tests | in their words |
|---|---|
{lines((str(number), text) for text, number in sorted(found.skips().items()))}
"""


def _counts(found: Comparison) -> Iterator[tuple[str, ...]]:
    for suite in (*SUITES, ""):
        stock, ours = found.counts("stock", suite), found.counts("ours", suite)
        if stock or ours:
            yield suite or "all", *(f"{stock[key]} / {ours[key]}" for key in COLUMNS)


def _causes(found: Comparison) -> Iterator[tuple[str, ...]]:
    for reason, stock in found.explained_on_stock.items():
        ours = found.explained.get(reason, [])
        if stock or ours:
            yield reason.cause, reason.kind, str(len(stock)), str(len(ours)), reason.why


def _named(found: Comparison) -> Iterator[str]:
    for reason, tests in found.explained.items():
        if tests:
            yield f"- {reason.cause} ({reason.kind}): " + ", ".join(f"`{test.partition('/')[2]}`" for test in tests)
    for test in found.unexplained:
        yield f"- **unexplained**: `{test}`"
    for test in found.lost:
        yield f"- **lost**: `{test}`"


def _pytest_counts(found: Comparison) -> str:
    names = {"passed": "passed", "failed": "failed", "error": "errors", "skipped": "skipped"}
    sides: tuple[Side, ...] = ("stock", "ours")
    counts = {side: found.statuses(side) for side in sides}
    return "\n".join(
        f"- {side}: {', '.join(f'{counts[side][name]} {word}' for name, word in names.items())}" for side in sides
    )


def _verdict(found: Comparison) -> str:
    return f"Passed on stock and lost through us: {len(found.lost)}; unexplained: {len(found.unexplained)}."


def last_line(text: str) -> str:
    said = [line for line in text.splitlines() if line.startswith("E ")] or text.strip().splitlines()
    return said[-1].removeprefix("E").strip() if said else ""


def lines(rows: Iterator[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
