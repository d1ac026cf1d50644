"""A file that goes to the disk while it is written.

Room checkpoint/ (leaf). Writing through the page cache leaves the disk idle until fsync. Here each stretch is sent on
its way when it is full, so that making arrays, digests and the disk go on at once, and what has arrived is dropped:
a file being written takes a few dozen MB of the page cache, the same pages again and again. O_DIRECT would do both, but
wants every byte copied into place first. May import the standard library. Proof: tests/checkpoint/test_disk.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["BLOCK", "NewFile"]

BLOCK = 4 << 20  # bytes that are sent to the disk at a time
_SMALL = 256 << 10  # bytes; what is smaller is gathered
_UNDER_WAY = 8 * BLOCK  # bytes that may not have arrived yet


class NewFile:
    """A new file at `path`, written from its beginning to its end. A context manager; an error in it leaves a part.

    summed  gets all bytes in order: a hash of hashlib or xxhash
    """

    def __init__(self, path: Path, summed: Any) -> None:
        self.size = 0
        self._summed = summed
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._gathered = bytearray()
        self._sent = self._dropped = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        if len(data) < _SMALL:
            self._gathered += data
            if len(self._gathered) < _SMALL:
                return
            data = b""
        self._put(self._gathered)
        self._gathered = bytearray()
        self._put(data)

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        self._summed.update(data)
        left = memoryview(data)
        while len(left):
            count = os.pwrite(self._descriptor, left, self.size)
            left, self.size = left[count:], self.size + count
        full = self.size // BLOCK * BLOCK
        if full > self._sent:
            self._sent = self._unneeded(self._sent, full)
            if full - _UNDER_WAY > self._dropped:
                self._dropped = self._unneeded(self._dropped, full - _UNDER_WAY)

    def _unneeded(self, begin: int, end: int) -> int:
        """Say that nobody will read these bytes: Linux begins to write those that it has not, and drops the others."""
        os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
        return end

    def finish(self) -> None:
        """All of it is on the disk. Raises OSError if not."""
        self._put(self._gathered)
        self._gathered = bytearray()
        os.fsync(self._descriptor)
        self._unneeded(0, self.size)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)
