"""The queue through which checkpoint writers report back.

Room megatron/. Stands in for a function of megatron.core.dist_checkpointing.strategies.filesystem_async, on
the cpu lane only: there forked writers, which upstream starts in the same process, share a plain queue.
Proof: tests/nemo/test_resume.py.
"""

from __future__ import annotations

import functools
import multiprocessing
from typing import Any

__all__ = ["get_write_results_queue"]

SECONDS = 60.0


class _Results:
    """put and get_nowait as upstream calls them: it looks for a result only after one was put.

    A multiprocessing queue hands items over in a thread, so a look right after a put may come too early:
    get_nowait waits. Raises queue.Empty after SECONDS.
    """

    def __init__(self) -> None:
        self._queue: Any = multiprocessing.get_context("fork").Queue()

    def put(self, item: Any) -> None:
        self._queue.put(item)

    def get_nowait(self) -> Any:
        return self._queue.get(timeout=SECONDS)


@functools.cache
def get_write_results_queue() -> _Results:
    """One queue a process; no manager process, which a killed rank would leave behind."""
    return _Results()
