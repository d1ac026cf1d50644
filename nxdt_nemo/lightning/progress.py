"""Progress bars are drawn as often as an eye can follow, not at every step.

Room lightning/. Drawing reads the loss back to the host. Acts on the bar of one trainer, by instance; no patch.
Proof: tests/lightning/test_host_reads.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["SECONDS", "slow_down"]

SECONDS = 0.5
"""Least time between two drawings."""


def slow_down(bar: Any, clock: Callable[[], float] = time.monotonic) -> None:
    """Let a TQDM or rich bar draw a step only if its last drawing is SECONDS ago, or the step is the last.

    bar   lightning's ProgressBar or a subclass (None and bars of another kind are left alone)
    """
    should = getattr(bar, "_should_update", None)
    if should is None or hasattr(should, "drawn"):
        return

    def due(current: int, total: Any) -> bool:
        now = clock()
        if not should(current, total) or (current != total and now - due.drawn < SECONDS):  # type: ignore[attr-defined]
            return False
        due.drawn = now  # type: ignore[attr-defined]
        return True

    due.drawn = float("-inf")  # type: ignore[attr-defined]
    bar._should_update = due
