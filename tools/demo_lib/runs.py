"""Child processes of the demo: output to a log file, progress to a callback, nothing left running.

Tool of `make demo`; standard library only. Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["ChildError", "child_environment", "quoted", "run_child"]

_SHOWN = 30  # lines of a failed child's log


class ChildError(Exception):
    """A child ended badly. `log` is its output file, `tail` the last lines of it."""

    def __init__(self, what: str, log: Path, reason: str) -> None:
        self.log, self.reason = log, reason
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        self.tail = [line for line in lines if line.strip()][-_SHOWN:]
        super().__init__(f"{what}: {reason}; its whole output is in {log}")


def child_environment() -> dict[str, str]:
    """This environment, with one thread a rank and every model hub switched off: a look-up would hang offline."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def quoted(value: object) -> str:
    """`value` as Hydra's command line takes it literally, blanks, commas and equals signs included."""
    return "'" + str(value).replace("'", "\\'") + "'"


def run_child(
    what: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    tick: Callable[[], bool] = lambda: False,
    every: float = 0.5,
    limit: float = 900.0,
) -> float:
    """Run `command`, output appended to `log`, calling `tick` every `every` seconds; returns its seconds.

    tick   returns True to have the child killed (SIGKILL, as a lost machine would) and run_child return
    Raises ChildError if it exits with another status than 0 or takes longer than `limit` seconds.
    Whatever ends this function, Ctrl-C too, also ends the child and its own children.
    """
    start = time.monotonic()
    with log.open("ab") as output:
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
        )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=every)
            if tick():
                return time.monotonic() - start
            if child.returncode is not None:
                break
            if time.monotonic() - start > limit:
                raise ChildError(what, log, f"still running after {limit:.0f} s")
    finally:
        with suppress(ProcessLookupError):  # the whole group: a rank may outlive its launcher
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        raise ChildError(what, log, f"exit status {child.returncode}")
    return time.monotonic() - start
