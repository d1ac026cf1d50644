"""The queue through which checkpoint writers report back, and what writes a file on a disk.

Room megatron/. Stands in for two functions of megatron.core.dist_checkpointing.strategies.filesystem_async. The queue
on the cpu lane only: there forked writers, which upstream starts in the same process, share a plain queue.
Proof: tests/nemo/test_resume.py, tests/megatron/test_utils.py.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

__all__ = ["get_write_results_queue", "write_preloaded_data"]

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


def write_preloaded_data(
    original: Callable[..., None],
    transform_list: Any,
    local_proc_idx: int,
    write_bucket: Any,
    results_queue: Any,
    count_queue: Any,
    use_fsync: bool,
    **kwargs: Any,
) -> None:
    """Upstream's; the multi-storage client serves its own addresses only, and files on a disk are plain files.

    Upstream hands it every file, and calls a fsync() that its files have no more since 1.0.
    """
    if not str(write_bucket[0]).startswith("msc://"):
        kwargs.pop("use_msc", None)
    original(transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs)
