"""A child that goes on in its parent's place, and what the parent says of its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


CHILD = """
import ctypes, os, signal, sys
from nxdt_nemo.audit.apart import go_on_in_a_child
from nxdt_nemo.cli.run import leave
from nxdt_nemo.errors import UserError

print("before")
parent = os.getpid()
try:
    go_on_in_a_child()
except UserError as error:
    leave(error)
print("after", os.getppid() == parent)
sys.stdout.flush()
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("ctypes.string_at(0)", 2, "falls off XLA, or reads a tensor of the device, whose contents an audit"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, "was ended by SIGKILL"),
    ],
)
def test_the_parent_ends_as_the_child_does(end: str, code: int, line: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NXDT_NEMO": "0"}
    command = [sys.executable, "-c", CHILD.format(end=end)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines() == ["before", "after True"]
    assert found.returncode == code and line in found.stderr and len(found.stderr.splitlines()) == bool(line)
    assert ("ctypes/__init__.py:" in found.stderr) == ("ctypes" in end)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_is_killed_takes_the_child_along(by: signal.Signals) -> None:
    end = "import time; print(os.getpid(), flush=True); time.sleep(600)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NXDT_NEMO": "0"}
    command = [sys.executable, "-c", CHILD.format(end=end)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int([parent.stdout.readline() for _ in range(3)][-1])
        parent.send_signal(by)
        assert parent.wait(timeout=30) == -by
    until = time.monotonic() + 30
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """A process that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
