"""`nxdt-nemo doctor`: the state of an installation, a target's environment, a self-test; Markdown for a bug report.

Room cli/. Parses and prints; audit/doctor collects. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nxdt_nemo import __version__
from nxdt_nemo.cli.output import cell
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.audit.doctor import Row

__all__ = ["doctor", "report"]

SELF_TEST = "nxdt-nemo-selftest.md"


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="With --target: a YAML file whose keys count.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDE]...", help="Hydra's: key=value.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Import nothing; seconds.")] = False,
    target: Annotated[
        str | None,
        typer.Option(help="Print an instance type's figures and the environment of a run there.", show_default=False),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --target: how many. Default: trainer.num_nodes; without CONFIG 2, or 1 without EFA.",
            show_default=False,
        ),
    ] = None,
    sdk: Annotated[str | None, typer.Option(help="With --target: the Neuron SDK.", show_default=False)] = None,
    on_device: Annotated[
        bool, typer.Option("--on-device", help="Test this machine in stages: from its device to a resumed run.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="With --on-device: the report.")] = Path(SELF_TEST),
) -> None:
    """Look at versions, lanes, traps and what is missing; exit code 1 if a run would go wrong.

    The output is Markdown, made to be pasted into a bug report: it holds no value of an environment variable
    but those of a short list of switches, and no host or user name.
    """
    if on_device:
        raise typer.Exit(_self_test(output))
    if target is not None:
        _target(target, config, overrides or [], nodes, sdk, as_json=as_json)
        return
    for name, value in {"": config, "--nodes ": nodes, "--sdk ": sdk}.items():
        if value is not None:
            raise UserError(f"{name}{value} needs --target", place="nxdt-nemo doctor", fix="name an instance type")
    from nxdt_nemo.audit.doctor import examine

    rows = examine(__version__, with_probes=not no_probe)
    bad = [row for row in rows if row.state == "problem"]
    if as_json:
        typer.echo(json.dumps({"problems": len(bad), "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
    else:
        typer.echo("\n".join(report(rows)))
    if bad:
        raise typer.Exit(1)


def _self_test(output: Path) -> int:
    """The self-test's exit code. It uses the room testing/, which stands above this one: a process of its own."""
    words = [sys.executable, "-P", "-m", "nxdt_nemo.testing.selftest", "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "NXDT_NEMO"}
    return subprocess.run(words, env=environment, check=False).returncode


def _target(
    name: str, config: Path | None, overrides: list[str], nodes: int | None, sdk: str | None, *, as_json: bool
) -> None:
    """Print the figures and the environment of an instance type, or of a configuration there."""
    from nxdt_nemo.audit.doctor.target import environment, figures
    from nxdt_nemo.config.instances import instance
    from nxdt_nemo.config.job import VERSION, Job
    from nxdt_nemo.config.validate import asked_on

    kind = instance(name, place="--target")
    if sdk is not None and re.fullmatch(VERSION, sdk) is None:
        raise UserError("is no version of the SDK", place=f"--sdk {sdk}", fix="write it as in 2.29")
    general = Job(instance=kind, nodes=2 if kind.efa_devices else 1)
    job = general if config is None else asked_on(config, overrides, kind)
    job = dataclasses.replace(job, lane=job.lane_there, nodes=nodes or job.nodes, sdk=sdk or job.sdk)
    job.check_lane()
    job.check_ranks()
    job.check_nodes()
    found: dict[str, Sequence[Any]] = {
        "target": list(figures(kind, job.cores_a_rank)),
        "environment": list(environment(job, all_modes=config is None)),
    }
    if as_json:
        typer.echo(json.dumps({part: [row._asdict() for row in rows] for part, rows in found.items()}, indent=2))
        return
    count = f"{job.nodes} of them" if job.nodes > 1 else "one"
    there = f"{kind.name}, {count}, {job.lane} lane, Neuron SDK {job.neuron_sdk}"
    typer.echo(f"{there}. Published figures; nothing was measured.\n")
    for rows in found.values():
        typer.echo("\n".join(_table(rows)) + "\n")


def _table(rows: Sequence[Any]) -> Iterator[str]:
    """Named tuples as a Markdown table; columns but the last two are padded, to be read as text too."""
    names = rows[0]._fields
    cells = [[cell(str(value)) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[at]) for row in cells)) for at, name in enumerate(names)]
    widths[-2:] = [len(name) for name in names[-2:]]
    for row in [list(names), ["-" * width for width in widths], *cells]:
        yield f"| {' | '.join(f'{value:{width}}' for value, width in zip(row, widths, strict=True))} |"


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown: a summary, what is no `ok`, and a table for each section, aligned to be read as text too."""
    from nxdt_nemo.audit.doctor.row import count

    numbers = {state: sum(row.state == state for row in rows) for state in ("problem", "note")}
    yield f"nxdt-nemo doctor: {count(numbers['problem'], 'problem')}, {count(numbers['note'], 'note')}"
    for section, found in groupby(rows, key=lambda row: row.section):
        group = list(found)
        width = max(len(cell(row.what)) for row in group)
        width = max(width, len(section))
        yield ""
        yield f"| state   | {section:{width}} | found |"
        yield f"|---------|{'-' * (width + 2)}|-------|"
        for row in group:
            text = f"{row.found}; {row.fix}" if row.fix else row.found
            yield f"| {row.state:7} | {cell(row.what):{width}} | {cell(text)} |"
