"""`nxdt-nemo validate CONFIG [OVERRIDES]`: what a run would refuse or say, without a run.

Room cli/. Parses and prints; config/validate.py finds. Imports no torch, no NeMo. Proof: tests/cli/test_validate.py.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nxdt_nemo.config.validate import Verdict
    from nxdt_nemo.config.values import Default

__all__ = ["validate"]

WIDTH = 118


def validate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file, or train for ours.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="OVERRIDES", help="As hydra takes them: key=value.", show_default=False),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option("--strict/--no-strict", help="Unknown keys and contradictions are errors.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--defaults", help="List all keys that are not written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a configuration: keys, values, what contradicts what, memory. Exit code 1 if a run would not start."""
    from nxdt_nemo.config.tuning_data import data_errors
    from nxdt_nemo.config.validate import read, validate_config
    from nxdt_nemo.config.view import View
    from nxdt_nemo.megatron import memory_of_config

    cfg = read(config, overrides or [])
    view = View(cfg, place=config.name)
    found = validate_config(cfg, place=config.name, strict=strict, more=data_errors(view))
    need = None if found.errors else memory_of_config.need(view, found.ranks)
    found.errors += memory_of_config.errors(view, found.ranks) if need else []
    found.judge(memory_of_config.doubts(view, found.ranks) if need else [])
    if as_json:
        typer.echo(json.dumps(found.as_json() | {"memory": str(need) if need else None}, indent=2, default=str))
    else:
        _print(found, str(need) if need else "", every)
    if not found.good:
        raise typer.Exit(1)


def _print(found: Verdict, memory: str, every: bool) -> None:
    for error in found.errors:
        typer.echo(f"error    {_flat(str(error))}")
    for line in found.warnings:
        typer.echo(f"warning  {_flat(line)}")
    _block("to be set before a run", found.to_be_set)
    _defaults([default for default in found.report.defaults if every or default.common])
    if memory:
        typer.echo(f"memory   {memory}, coarsely")
    if table := found.report.render():
        typer.echo(f"means something else on this backend\n{textwrap.indent(table, '  ')}")
    count = len(found.errors)
    verdict = "good" if not count else "1 error" if count == 1 else f"{count} errors"
    where = f", {found.ranks} ranks" if found.ranks else ""
    typer.echo(f"{found.place}: {verdict}{where}")
    sys.stdout.flush()


def _defaults(unwritten: list[Default]) -> None:
    """What keys are that nobody wrote; those of a restored model share their words."""
    from nxdt_nemo.config.values import RESTORED

    _block("not written, so", [f"{entry.key}={_yaml(entry.value)}" for entry in unwritten if entry.value != RESTORED])
    _block(f"not written, so {RESTORED}", [entry.key for entry in unwritten if entry.value == RESTORED])


def _block(title: str, entries: list[str]) -> None:
    """A few words on each, side by side."""
    if entries:
        typer.echo(f"{title} ({len(entries)}):")
        typer.echo(textwrap.fill("  ".join(entries), WIDTH, initial_indent="  ", subsequent_indent="  "))


def _flat(line: str) -> str:
    return " ".join(line.split())


def _yaml(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
