"""Memory that XLA:CPU frees after a step stays with the process, for the next step.

Room runtime/. Calls glibc's mallopt; nothing under another C library. Proof: tests/runtime/test_xla.py.

XLA:CPU allocates all buffers of a step anew. glibc maps large ones by themselves and unmaps them when they are freed,
so that the kernel has to clear each page again in each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

# malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX. Other threads' arenas give memory back whatever the threshold is.
_KEEP = {-4: 0, -1: -1, -8: 1}
_DEFAULT = {-4: 65536, -1: 128 * 1024, -8: 0}


def keep_freed_memory() -> Callable[[], None]:
    """From now on this process gives no freed memory back to the kernel; returns what puts glibc's defaults back."""
    _set(_KEEP)
    return give_back_freed_memory


def give_back_freed_memory() -> None:
    """glibc's defaults again: where no step is run, kept memory only adds up (8 GB for the audit of 9 ranks, not 2)."""
    if (library := _set(_DEFAULT)) is not None:
        library.malloc_trim(0)


def _set(parameters: dict[int, int]) -> ctypes.CDLL | None:
    """Returns glibc, None under another C library."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return None
    for parameter, value in parameters.items():
        library.mallopt(parameter, value)
    return library
