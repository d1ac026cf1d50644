"""What the demo says at its end: one table, in the terminal and in docs/results/demo.md.

Tool of `make demo`. Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version

from rich.table import Table
from rich.text import Text

from nxdt_nemo import __version__

from .curves import Curve

__all__ = ["Rows", "cell", "listed", "loss_rows", "markdown", "speed", "table", "versions"]

Rows = list[tuple[str, str]]

_VERSIONS = ("nemo_toolkit", "megatron-core", "lightning", "torch")


def loss_rows(train: Curve, validation: Curve) -> Rows:
    """First and last loss of each curve, with their steps. Raises ValueError if a curve is empty."""
    rows = []
    for name, curve in (("train", train), ("validation", validation)):
        if not curve:
            raise ValueError(f"no {name} loss was logged")
        (first, begin), (last, end) = curve[0], curve[-1]
        rows.append((f"{name} loss", f"{begin:.3f} (step {first}) → {end:.3f} (step {last})"))
    return rows


def speed(seconds: Curve, tokens: int) -> float:
    """Tokens a second by the median step; `tokens` are those of one global batch."""
    return tokens / statistics.median(value for _, value in seconds)


def versions() -> str:
    """The versions that decide the numbers, in one line."""
    ours = [f"nxdt_nemo {__version__}", f"Python {platform.python_version()}"]
    return ", ".join([*ours, *(f"{name} {version(name)}" for name in _VERSIONS)])


def table(rows: Rows) -> Table:
    """The rows as a rich table; values are shown as they are, never read as markup."""
    drawn = Table(title="nxdt_nemo demo", show_header=False, title_justify="left")
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for label, value in rows:
        drawn.add_row(Text(label), Text(value))
    return drawn


def cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return text.replace("|", "&#124;")


def listed(rows: Rows) -> str:
    """The rows as a Markdown table."""
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {cell(value)} |" for label, value in rows)])


def markdown(rows: Rows, samples: Sequence[Mapping[str, str]], *, command: str, picture: str) -> str:
    """The result as a page: command, date, versions, table, picture, generated text."""
    texts = "\n".join(f"- **{s['prompt']}**{s['text'].removeprefix(s['prompt'])}" for s in samples)
    return (
        "# The demo: a small Llama on two ranks\n\n"
        f"`{command}`, {date.today().isoformat()}. {versions()}.\n"
        "Written by `tools/demo.py --results`; every number is of that one run.\n\n"
        f"{listed(rows)}\n\n"
        f"![loss curve]({picture})\n\n"
        f"What the model makes of a prompt after that little training:\n\n{texts}\n"
    )
