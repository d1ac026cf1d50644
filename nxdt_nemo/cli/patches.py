"""`nxdt-nemo patches`: what we change in upstream, and whether upstream still looks as recorded.

Room cli/. Imports typer; rich and the patching room are loaded by the command that needs them.
Proof: tests/patching/test_cli.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nxdt_nemo.errors import PatchError, UserError

if TYPE_CHECKING:
    from nxdt_nemo.patching.records import Record
    from nxdt_nemo.patching.verify import Finding

__all__ = ["app"]

app = typer.Typer(help="The patches: list, verify, explain.", no_args_is_help=True, rich_markup_mode=None)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Folder = Annotated[Path | None, typer.Option("--folder", help="Read records from here instead of patches/.")]
_Against = Annotated[
    Path | None, typer.Option("--against", help="A site-packages folder to look in instead of this environment.")
]


@app.command("list")
def list_(as_json: _Json = False, folder: _Folder = None) -> None:
    """Every record, in the order of the files."""
    with _one_line():
        records = _load(folder)
    if as_json:
        _print_json([dataclasses.asdict(record) for record in records])
        return
    rows = [[r.file, r.id, r.kind, r.target, ", ".join(r.versions), r.why] for r in records]
    _print_table(f"{len(records)} patches", ["file", "id", "kind", "target", "versions", "why"], rows)


@app.command()
def verify(
    as_json: _Json = False,
    static_only: Annotated[bool, typer.Option("--static-only", help="Import nothing; seconds.")] = False,
    against: _Against = None,
    folder: _Folder = None,
) -> None:
    """Check every record against what is installed; exit code 1 on drift."""
    from nxdt_nemo.patching.verify import verify as check

    if against is not None and not against.is_dir():
        raise UserError("no such folder", place=f"--against {against}")
    with _one_line():
        rows = check(_load(folder), against=against, with_live=not static_only)
    bad = [row for row in rows if not row.ok]
    if as_json:
        _print_json([dataclasses.asdict(row) | {"ok": row.ok} for row in rows])
    else:
        cells = [[r.id, r.kind, r.target, _mark(r.static), _mark(r.live)] for r in rows]
        _print_table(f"{len(rows)} patches, {len(bad)} drifted", ["id", "kind", "target", "static", "live"], cells)
    if bad:
        raise typer.Exit(1)


@app.command()
def explain(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A record's target or id.")],
    folder: _Folder = None,
) -> None:
    """What a record changes and why, and the upstream code that it stands in for."""
    with _one_line():
        records = _load(folder)
    found = [record for record in records if target in (record.target, record.id)]
    if not found:
        raise UserError(f"no record has this target or id{_near(target, records)}", place=target)
    for record in found:
        typer.echo(f"{record.place}")
        for name, value in dataclasses.asdict(record).items():
            if name not in ("id", "file") and value not in ("", None):
                shown = ", ".join(value) if isinstance(value, tuple | list) else value
                typer.echo(f"  {name:12} {shown}")
        for line in _upstream_code(record.target):
            typer.echo(line)


@app.command()
def fingerprint(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="module.path.name, naming the defining class.")],
    against: _Against = None,
) -> None:
    """The fingerprint line for a record of TARGET, from the source that is installed."""
    from nxdt_nemo.patching.verify import fingerprint as compute

    with _one_line():
        digest, _ = compute(target, against=against)
    typer.echo(f'fingerprint = "{digest}"')


@app.command()
def count(as_json: _Json = False, folder: _Folder = None) -> None:
    """How many patches there are, by file and kind; the figure to shrink."""
    with _one_line():
        records = _load(folder)
    by_file = Counter(record.file.removesuffix(".toml") for record in records)
    by_kind = Counter(record.kind for record in records)
    if as_json:
        _print_json({"total": len(records), "by_file": by_file, "by_kind": by_kind})
        return
    parts = [f"{name} {number}" for counter in (by_file, by_kind) for name, number in sorted(counter.items())]
    typer.echo(f"{len(records)} patches" + (f" ({', '.join(parts)})" if parts else ""))


@contextmanager
def _one_line() -> Iterator[None]:
    """A PatchError is the answer here, not a crash: one line and exit code 1."""
    try:
        yield
    except PatchError as error:
        typer.echo(f"nxdt-nemo: {error}", err=True)
        raise typer.Exit(1) from error


def _load(given: Path | None) -> list[Record]:
    from nxdt_nemo._resources import folder
    from nxdt_nemo.patching.records import load

    if given is not None and not given.is_dir():
        raise UserError("no such folder", place=f"--folder {given}")
    return load(given or folder("patches"))


def _near(target: str, records: list[Record]) -> str:
    import difflib

    names = [name for record in records for name in (record.target, record.id)]
    close = difflib.get_close_matches(target, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _upstream_code(target: str) -> Iterator[str]:
    """`file:line` and the text of each definition of the target; or why there is none."""
    from nxdt_nemo.patching.fingerprint import Source
    from nxdt_nemo.patching.verify import find

    try:
        place = find(target)
    except PatchError as error:
        yield f"  upstream     {error}"
        return
    if place.file is None or not place.attribute:
        yield f"  upstream     {place.file or place.module}"
        return
    source = Source(place.file)
    text = source.text.decode(errors="replace").splitlines()
    spans = source.lines(place.attribute)
    if not spans:
        yield f"  upstream     not in {place.file}"
    for first, last in spans:
        yield f"  upstream     {place.file}:{first}"
        yield from (f"    {line}".rstrip() for line in text[first - 1 : last])


def _mark(finding: Finding) -> str:
    if finding.ok:
        return "ok"
    return f"DRIFT: {finding.why}" if finding.ok is False else f"- ({finding.why})"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style="red" if cell.startswith("DRIFT") else "") for cell in row))
    # A pipe has no width of its own: give it room, so that grep finds whole names.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)
