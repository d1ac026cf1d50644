"""Environment variables that are set for a while.

Room runtime/. Imports the standard library only. Proof: tests/runtime/test_xla.py, tests/test_activation.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["set_variable"]


def set_variable(name: str, value: str) -> Callable[[], None]:
    """Set it in this process and those that it starts; returns what puts back how it was."""
    before = os.environ.get(name)
    os.environ[name] = value

    def restore() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    return restore
