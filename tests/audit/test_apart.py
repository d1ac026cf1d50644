"""A child that goes on in its parent's place, and what the parent says of its end."""

from __future__ import annotations

import os
import subprocess
import sys
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
