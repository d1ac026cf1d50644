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
from nxdt_nemo.cli.output import cell, into
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


def _asked(config: Path | None, overrides: Sequence[str]) -> str:
    """The cache that a configuration names, else the environment's, else Neuron's default."""
    from nxdt_nemo.audit.compile.cache import DEFAULT
    from nxdt_nemo.config.validate import asked

    found = None if config is None else asked(config, overrides)[0].keys.get("compiler_cache_url")
    return found or os.environ.get("NEURON_COMPILE_CACHE_URL") or DEFAULT


def _compile(config: Path, overrides: Sequence[str], script: str | None, cache: str | None, *, as_json: bool) -> int:
    """Run, and say how many graphs there were and how many the cache did not have.

    The run's exit code; 1 for a run that ended well and asked for none.
    """
    from nxdt_nemo.audit.compile.short_run import command, read_counts
    from nxdt_nemo.audit.compile.short_run import overrides as short
    from nxdt_nemo.audit.compile.short_run import ranks as ranks_of
    from nxdt_nemo.config.validate import asked, find
    from nxdt_nemo.runtime.machine import neuron_devices

    if script is not None and not Path(script).is_file():
        raise UserError("no such script", place=f"--script {script}")
    config = find(config)
    job, view = asked(config, overrides)
    _needs_graphs(job, view)
    ranks, neuron = ranks_of(view), neuron_devices() > 0
    url = cache or job.keys.get("compiler_cache_url") or ("" if neuron else DEFAULT_XLA)
    if not neuron and "://" in url:
        raise UserError(f"{url} is not a folder", place="cache", fix="on XLA:CPU use a folder: --cache FOLDER")
    if url and "://" not in url:
        url = str(into(Path(url), "cache").resolve())
    with tempfile.TemporaryDirectory(prefix="nxdt-compile-") as made:
        folder = Path(made)
        words = [*overrides, *short(view, folder / "run", url if neuron else "")]
        done = subprocess.run(
            command(script, config.resolve(), words, ranks),
            env=_environment(job, url, folder, neuron=neuron),
            stdout=None if not as_json else subprocess.DEVNULL,
            check=False,
        )
        counts = read_counts(folder)
    # What torch-xla counts beneath Neuron's wrapper nobody has seen.
    code = done.returncode or int(not neuron and counts.graphs == 0)
    if done.returncode:
        reached = "its graphs up to there are in the cache" if counts.graphs else "it asked for no graph"
        console.notice(f"the run ended with exit code {code}: {reached}")
    elif code:
        console.notice(f"the run asked for no graph: {script or config} trains nothing on the xla lane")
    if as_json:
        typer.echo(json.dumps({"cache": url, "ranks": ranks, "exit_code": code, **vars(counts)}))
    elif counts.graphs and not neuron:
        typer.echo(f"{counts.graphs} graphs on {ranks} ranks, {counts.missed} of them not in {url} before")
    return code


def _needs_graphs(job: Job, view: View) -> None:
    """Raises UserError for a lane without graphs of torch-xla's; `auto` is the xla lane here."""
    from nxdt_nemo.runtime.select import VARIABLE

    key = job.keys.get("runtime")
    lane = key or os.environ.get(VARIABLE) or "auto"
    if lane in ("auto", "xla"):
        return
    reason = "only the xla lane has graphs to compile ahead"
    if key:
        raise view.error(f"neuron.runtime={lane}: {reason}", "set neuron.runtime=xla")
    raise UserError(reason, place=f"{VARIABLE}={lane}", fix="set it to xla, or leave it out")


def _environment(job: Job, url: str, folder: Path, *, neuron: bool) -> dict[str, str]:
    """The run's: the lane that traces, the table's variables for compiling, and where counts and graphs go."""
    import dataclasses

    from nxdt_nemo.config.environment import apply, settings
    from nxdt_nemo.config.instances import INSTANCES
    from nxdt_nemo.runtime.machine import product_name
    from nxdt_nemo.runtime.select import VARIABLE

    environ = os.environ | {VARIABLE: "xla", "NXDT_NEMO_COMPILE_REPORT": str(folder)}
    keys = {**job.keys, "compiler_cache_url": url} if neuron and url else job.keys
    job = dataclasses.replace(job, keys=keys, instance=job.instance or INSTANCES.get(product_name()))
    for line in apply(settings(job, "process", "compile"), environ):
        console.warn(line)
    if not neuron:
        environ["XLA_PERSISTENT_CACHE_PATH"] = url
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
        state = f"{graph.state}, {graph.lock}" if graph.lock not in ("", graph.state) else graph.state
        cells = (graph.name, graph.compiler, state, _size(graph.size), f"{graph.age / 3600:.1f}")
        yield f"| {' | '.join(cell(text) for text in cells)} |"
    if any(graph.lock == "stale lock" for graph in graphs):
        yield ""
        yield "Where nobody compiles any more: neuron_parallel_compile --command clear-locks"
    if any(graph.state == "failed" for graph in graphs):
        yield ""
        yield "Failed graphs are not tried again: add --retry_failed_compilation to neuron.compiler_flags for one run"


def _size(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"
