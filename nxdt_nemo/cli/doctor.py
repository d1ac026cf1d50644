"""`nxdt-nemo doctor`: the state of an installation, as Markdown tables for a bug report.

Room cli/. Parses and prints; audit/doctor collects. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from nxdt_nemo import __version__

if TYPE_CHECKING:
    from nxdt_nemo.audit.doctor import Row

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Import nothing; seconds.")] = False,
) -> None:
    """Look at versions, lanes, traps and what is missing; exit code 1 if a run would go wrong.

    The output is Markdown, made to be pasted into a bug report: it holds no value of an environment variable
    but those of a short list of switches, and no host or user name.
    """
    from nxdt_nemo.audit.doctor import examine

    rows = examine(__version__, with_probes=not no_probe)
    bad = [row for row in rows if row.state == "problem"]
    if as_json:
        typer.echo(json.dumps({"problems": len(bad), "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
    else:
        typer.echo("\n".join(report(rows)))
    if bad:
        raise typer.Exit(1)


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown: a summary, what is no `ok`, and a table for each section, aligned to be read as text too."""
    from nxdt_nemo.audit.doctor.row import count

    numbers = {state: sum(row.state == state for row in rows) for state in ("problem", "note")}
    yield f"nxdt-nemo doctor: {count(numbers['problem'], 'problem')}, {count(numbers['note'], 'note')}"
    for section, found in groupby(rows, key=lambda row: row.section):
        group = list(found)
        width = max(len(_cell(row.what)) for row in group)
        width = max(width, len(section))
        yield ""
        yield f"| state   | {section:{width}} | found |"
        yield f"|---------|{'-' * (width + 2)}|-------|"
        for row in group:
            text = f"{row.found}; {row.fix}" if row.fix else row.found
            yield f"| {row.state:7} | {_cell(row.what):{width}} | {_cell(text)} |"


def _cell(text: str) -> str:
    """One line without what Markdown would take for the end of a cell, or for emphasis."""
    escaped = " ".join(text.split()).replace("|", "\\|")
    return escaped.replace("*", "\\*")
