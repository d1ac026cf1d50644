"""Tables of results: on the terminal, and in a page of docs/results."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from nxdt_nemo.testing.parity import Errors, Row

__all__ = ["PARITY_COLUMNS", "Line", "Sheet", "heading", "parity_line", "show"]

PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "lightning", "numpy")
PARITY_COLUMNS = (
    "model", "run", "against", "loss", "grad norm", "gradient", "of parameter", "copies", "tolerance", "verdict",
)  # fmt: skip
FOLDED = ("run", "against", "of parameter", "note", "arguments")  # columns that a narrow terminal may break


@dataclass(frozen=True)
class Line:
    """One line's text, in the order of the sheet's columns, and whether it is as it must be."""

    cells: Sequence[str]
    good: bool


@dataclass
class Sheet:
    """A table that grows line by line."""

    title: str
    columns: Sequence[str]
    lines: list[Line] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """True when every line is as it must be."""
        return all(line.good for line in self.lines)

    @property
    def markdown(self) -> str:
        """For a page."""
        rows = [f"| {' | '.join(line.cells)} |" for line in self.lines]
        return "\n".join([f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}", *rows])


def show(sheets: Sequence[Sheet], console: Console) -> None:
    """Print each sheet that has lines; lines that are not as they must be in red."""
    for sheet in sheets:
        table = Table(title=sheet.title)
        for name in sheet.columns:
            table.add_column(name, no_wrap=name not in FOLDED)
        for line in sheet.lines:
            table.add_row(*line.cells, style="" if line.good else "bold red")
        if sheet.lines:
            Console(width=max(console.width, 150)).print(table)


def heading(command: str) -> str:
    """How and with what a page was made."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    made = f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, cpu lane, one thread a rank, {platform.machine()}."
    return f"{made}\nPython {platform.python_version()}, {versions}."


def limit(tolerance: float | Errors) -> str:
    """A tolerance as text: one number, or one a kind."""
    if isinstance(tolerance, Errors):
        return " ".join(f"{number:.1e}" for number in tolerance.kinds[:3])
    return f"{tolerance:.0e}"


def parity_line(row: Row) -> Line:
    """A row of nxdt_nemo.testing.parity under PARITY_COLUMNS."""
    found = row.errors
    numbers = [f"{number:.1e}" for number in (found.loss, found.norm, found.grad)]
    ends = [f"{found.copies:.1e}", limit(row.tolerance), row.verdict]
    return Line([row.family, row.left, row.right, *numbers, found.where, *ends], row.good)
