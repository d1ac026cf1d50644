"""One line of the doctor's report.

Room audit/. Imports the standard library only. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Row", "State", "count", "output_of"]

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Row:
    """What was looked at, what was found, and for a note or a problem the fix in a few words.

    ok       as tested, or without effect
    note     works, with something to know
    problem  a run stops or goes wrong
    """

    section: str
    what: str
    found: str
    state: State = "ok"
    fix: str = ""


def count(number: int, word: str) -> str:
    """`1 note`, `2 notes`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def output_of(command: Sequence[str], seconds: float = 5) -> str | None:
    """A command's output without its last newline; None if it fails, is not there or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()
