"""What the package says to the person at the terminal; shared by all rooms.

Imports nothing heavy. Lines go to stderr, so that a script's stdout stays its own, and on many ranks
a line is printed once, by rank 0.
"""

from __future__ import annotations

import os
import sys

__all__ = ["global_rank", "is_rank_zero", "notice", "once", "warn"]

_said: set[str] = set()


def global_rank() -> int:
    """This process's rank as its launcher announced it (RANK, SLURM_PROCID, LOCAL_RANK); 0 if none did."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


def is_rank_zero() -> bool:
    """True on the one rank that prints."""
    return global_rank() == 0


def notice(text: str) -> None:
    """Print `nxdt_nemo: text` on rank 0."""
    if is_rank_zero():
        print(f"nxdt_nemo: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on rank 0."""
    notice(f"warning: {text}")


def once(text: str, *, key: str | None = None) -> None:
    """Print a notice the first time this process has it to say (told apart by key, else by the text)."""
    if (key or text) not in _said:
        _said.add(key or text)
        notice(text)
