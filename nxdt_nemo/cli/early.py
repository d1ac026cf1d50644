"""The environment of a run, set before the script starts: torch_xla and the Neuron runtime read it on import.

Room cli/. Imports no torch. `nxdt-nemo run` calls prepare; a plain `NXDT_NEMO=1 python script.py` calls plain_start
while Python itself starts, so that both have it. Proof: tests/cli/test_early.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nxdt_nemo.errors import UserError

if TYPE_CHECKING:
    from nxdt_nemo.config import Report
    from nxdt_nemo.config.instances import Instance
    from nxdt_nemo.config.job import Job

__all__ = ["plain_start", "prepare", "script_of"]

# Options of python that take the next word, and those after which there is no script.
_WITH_VALUE = ("W", "X", "-check-hash-based-pycs")
_NO_SCRIPT = ("c", "m")
# Console commands that train in their own process: NeMo 2.0's.
_COMMANDS = ("nemo",)
# A file without these words has no configuration that could be composed.
_DECORATORS = (b"hydra_runner", b"hydra.main", b"from hydra")


def prepare(report: Report | None) -> list[str]:
    """Hand the lane that a configuration names, and the environment that its job needs, to this process and children.

    report  what the check found; None when the script's configuration is not known: the lane's general values then
    Returns lines to tell the user. Raises LaneError for a lane that this machine cannot run, ConfigError for an LNC
    that it has not.
    """
    from nxdt_nemo.config.environment import apply, settings
    from nxdt_nemo.config.instances import INSTANCES
    from nxdt_nemo.runtime.machine import product_name
    from nxdt_nemo.runtime.select import VARIABLE, select
    from nxdt_nemo.runtime.xla.graph_cache import watch

    if report is not None and report.neuron is not None and report.neuron.runtime is not None:
        os.environ[VARIABLE] = report.neuron.runtime
    if report is not None and report.job is None:
        return []
    here = INSTANCES.get(product_name())
    if report is None or report.job is None:
        job = _without_configuration(here)
    else:
        job = dataclasses.replace(report.job, instance=report.job.instance or here)
    lane, _ = select()
    watch()
    job = dataclasses.replace(job, lane=lane.name)
    told = apply(settings(job), os.environ)
    return told if lane.name != "cpu" else []


def _without_configuration(here: Instance | None) -> Job:
    """A job of which nothing is known but the ranks that a launcher has placed on this host.

    Without them, and without an LNC that the user has exported, the instance counts for nothing: the script's ranks may
    need another LNC than the chip's own, and compiler and runtime agree on that one by themselves.
    """
    from nxdt_nemo.config.environment import LNC
    from nxdt_nemo.config.job import Job
    from nxdt_nemo.runtime.machine import ranks_placed_here

    ranks = ranks_placed_here() or None
    return Job(devices=ranks, instance=here if ranks or os.environ.get(LNC) else None)


def plain_start(words: Sequence[str]) -> None:
    """prepare() for the script that a starting interpreter is about to run.

    words  sys.orig_argv
    Silent: a configuration is checked again, and everything said, where the script hands it over. A script without one
    gets what needs none, on the lane of a device; its precision mode is not known.
    """
    script, arguments = script_of(words)
    if script is None:
        return
    try:
        report = _report_of(script, arguments)
        if report is not None or _on_a_device():
            prepare(report)
    except UserError:
        return


def _report_of(script: Path, arguments: Sequence[str]) -> Report | None:
    if not any(word in script.read_bytes() for word in _DECORATORS):
        return None
    from nxdt_nemo.config import precheck

    return precheck(script, list(arguments), os.environ)


def _on_a_device() -> bool:
    from nxdt_nemo.runtime.select import select

    return select()[0].name != "cpu"


def script_of(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """The script in a command line of python's, and its arguments; None for -c, -m, a prompt or another command."""
    at = 1
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        letters = words[at][1:]
        if not letters.startswith("-") and any(letter in letters for letter in _NO_SCRIPT):
            return None, ()
        at += 2 if letters in _WITH_VALUE else 1
    if at >= len(words) or not os.path.isfile(words[at]):
        return None, ()
    if not words[at].endswith(".py") and os.path.basename(words[at]) not in _COMMANDS:
        return None, ()
    return Path(words[at]), words[at + 1 :]
