"""The queue through which checkpoint writers report back.

Room megatron/. Stands in for a function of megatron.core.dist_checkpointing.strategies.filesystem_async, on
the cpu lane only: there a fork is as safe as the forked writers that upstream starts in the same process.
"""

from __future__ import annotations

import functools
import multiprocessing
from typing import Any

__all__ = ["get_write_results_queue"]


@functools.cache
def get_write_results_queue() -> Any:
    """A manager's queue, one a process, its manager forked: no second import of the script."""
    return multiprocessing.get_context("fork").Manager().Queue()
