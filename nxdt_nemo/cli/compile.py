"""`nxdt-nemo compile`: fill the compilation cache by a short run, or list what is in it.

Room cli/. Parses, starts and prints; audit/compile knows the run and the cache. Proof: tests/cli/test_compile.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nxdt_nemo import console
from nxdt_nemo.cli.output import into
from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.audit.compile.cache import Graph
    from nxdt_nemo.config.job import Job
    from nxdt_nemo.config.view import View

__all__ = ["compile_graphs"]

DEFAULT_XLA = "nxdt-nemo-cache"


def compile_graphs(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A NeMo YAML file.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[OVERRIDE]...", help="Hydra's: key=value.", show_default=False)
    ] = None,
    script: Annotated[
        str | None, typer.Option(help="Your training script. Default: this package's own.", show_default=False)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Folder or s3:// address. Default: neuron.compiler_cache_url.", show_default=False),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the cache; compile nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run CONFIG for a few steps, without checkpoints or loggers, so that each graph is in the cache.

    On a Neuron device AWS's neuron_parallel_compile extracts graphs and compiles them in parallel. On XLA:CPU,
    torch-xla's own cache is filled: it tells which graphs a later start has not met, but cannot spare it compiling.
    """
    if listing:
        _list(cache or _asked(config, overrides or []), as_json=as_json)
        return
    if config is None:
        raise UserError("which configuration?", place="nxdt-nemo compile", fix="name a YAML file, or use --list")
    _needs_a_device()
    raise typer.Exit(_compile(config, overrides or [], script, cache, as_json=as_json))


def _needs_a_device() -> None:
    """Raises UserError for Neuron's compiler on a host without a device: its wrapper runs the job to extract graphs."""
    from nxdt_nemo.runtime.machine import neuron_devices

    if shutil.which("neuron_parallel_compile") and not neuron_devices():
        reason = "neuron_parallel_compile extracts graphs on a Neuron device, and this host has none"
        raise UserError(reason, place="nxdt-nemo compile", fix="compile on an instance with Trainium")


def _needs_graphs(view: View) -> None:
    """Raises ConfigError for a lane that traces none."""
    lane = view.get("neuron.runtime")
    if lane in ("cpu", "neuron"):
        raise view.error(f"neuron.runtime={lane}: this lane traces no graphs", "compile with neuron.runtime=xla")


def _asked(config: Path | None, overrides: Sequence[str]) -> str:
    """The cache that a configuration names, else the environment's, else Neuron's default."""
    from nxdt_nemo.audit.compile.cache import DEFAULT
    from nxdt_nemo.config.validate import asked

    found = None if config is None else asked(config, overrides)[0].keys.get("compiler_cache_url")
    return found or os.environ.get("NEURON_COMPILE_CACHE_URL") or DEFAULT


def _compile(config: Path, overrides: Sequence[str], script: str | None, cache: str | None, *, as_json: bool) -> int:
    """Run, and say how many graphs there were and how many the cache did not have. The run's exit code."""
    from nxdt_nemo.audit.compile.short_run import command, read_counts
    from nxdt_nemo.audit.compile.short_run import overrides as short
    from nxdt_nemo.audit.compile.short_run import ranks as ranks_of
    from nxdt_nemo.config.validate import asked, find
    from nxdt_nemo.runtime.machine import neuron_devices

    if script is not None and not Path(script).is_file():
        raise UserError("no such script", place=f"--script {script}")
    config = find(config)
    job, view = asked(config, overrides)
    _needs_graphs(view)
    ranks, neuron = ranks_of(view), neuron_devices() > 0
    url = cache or job.keys.get("compiler_cache_url") or ("" if neuron else DEFAULT_XLA)
    if not neuron and "://" in url:
        raise UserError(f"{url} is not a folder", place="cache", fix="on XLA:CPU use a folder: --cache FOLDER")
    if url and "://" not in url:
        into(Path(url), "cache")
    with tempfile.TemporaryDirectory(prefix="nxdt-compile-") as made:
        folder = Path(made)
        words = [*overrides, *short(view, folder / "run")]
        if view.get("neuron.runtime") is not None:
            words.append("++neuron.runtime=xla")  # auto would take the cpu lane of a host without devices
        done = subprocess.run(
            command(script, config.resolve(), words, ranks),
            env=_environment(job, url, folder, neuron=neuron),
            stdout=None if not as_json else subprocess.DEVNULL,
            check=False,
        )
        counts = read_counts(folder)
    nothing = not neuron and not counts.graphs
    if done.returncode and not nothing:
        console.notice(f"the run ended with exit code {done.returncode}: its graphs up to there are in the cache")
    code = done.returncode or int(nothing)
    if as_json:
        typer.echo(json.dumps({"cache": url, "ranks": ranks, "exit_code": code, **vars(counts)}))
    elif not neuron:
        typer.echo(f"{counts.graphs} graphs on {ranks} ranks, {counts.missed} of them not in {url} before")
    if nothing:
        ended = f"and ended with exit code {done.returncode}" if done.returncode else "and trained nothing"
        raise UserError(f"the run asked for no graph {ended}", place=script or str(config), fix="see what it said")
    return code


def _environment(job: Job, url: str, folder: Path, *, neuron: bool) -> dict[str, str]:
    """The run's: the lane that traces, the table's variables for compiling, and where counts and graphs go."""
    import dataclasses

    from nxdt_nemo.config.environment import apply, settings
    from nxdt_nemo.runtime.select import VARIABLE

    environ = dict(os.environ)
    if environ.get(VARIABLE) == "neuron":
        raise UserError("the neuron lane traces no graphs", place=f"{VARIABLE}=neuron", fix=f"set {VARIABLE}=xla")
    environ[VARIABLE] = "xla"
    keys = {**job.keys, "compiler_cache_url": url} if neuron and url else job.keys
    for line in apply(settings(dataclasses.replace(job, keys=keys), "process", "compile"), environ):
        console.warn(line)
    environ["NXDT_NEMO_COMPILE_REPORT"] = str(folder)
    if not neuron:
        environ["XLA_PERSISTENT_CACHE_PATH"] = str(Path(url).resolve())
    return environ


def _list(url: str, *, as_json: bool) -> None:
    from nxdt_nemo.audit.compile.cache import contents

    graphs = contents(url)
    if as_json:
        typer.echo(json.dumps({"cache": url, "graphs": [vars(graph) for graph in graphs]}, indent=2))
    else:
        typer.echo("\n".join(_lines(url, graphs)))


def _lines(url: str, graphs: Sequence[Graph]) -> Iterator[str]:
    from nxdt_nemo.audit.compile.cache import counted

    states = ", ".join(f"{number} {state}" for state, number in counted(graphs).items()) or "empty"
    yield f"{url}: {len(graphs)} graphs, {_size(sum(graph.size for graph in graphs))}; {states}"
    if graphs:
        yield ""
        yield "| graph | compiler | state | size | hours old |"
        yield "|---|---|---|---|---|"
    for graph in graphs:
        state = f"{graph.state}, stale lock" if graph.left and graph.state != "stale lock" else graph.state
        cells = (graph.name, graph.compiler, state, _size(graph.size), f"{graph.age / 3600:.1f}")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    if any(graph.left for graph in graphs):
        yield ""
        yield "Where nobody compiles any more: neuron_parallel_compile --command clear-locks"
    if any(graph.state == "failed" for graph in graphs):
        yield ""
        yield "Failed graphs are not tried again: add --retry_failed_compilation to neuron.compiler_flags for one run"


def _size(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"
