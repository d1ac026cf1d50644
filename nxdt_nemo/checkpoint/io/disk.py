"""A file written past the page cache, in blocks, by threads of its own.

Room checkpoint/ (leaf). What fills a block and what writes one wait for each other only if all blocks are full, so
making arrays, digests and the disk go on at once; and the disk's part is over when the last block is, where cached
writes leave it to fsync. Where a file system knows no O_DIRECT the same goes through the cache.
May import xxhash, numpy and the standard library. Proof: tests/checkpoint/test_disk.py.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BLOCK", "Blocks", "DirectFile"]

BLOCK = 4 << 20  # bytes of a block
_ALIGN = 4096  # of offsets, sizes and addresses, for most devices
_REFUSED = (errno.EINVAL, errno.ENOTSUP)


class Blocks:
    """Blocks of memory that files being written share, and the threads that write them. Close it when they are done.

    count  how many; a file has two at least
    """

    def __init__(self, count: int, threads: int) -> None:
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(mmap.mmap(-1, BLOCK))  # a page's beginning, which O_DIRECT wants
        self._pool = ThreadPoolExecutor(threads, "disk")

    def take(self) -> mmap.mmap:
        """A free one; waits until there is one."""
        return self._free.get()

    def give(self, block: mmap.mmap) -> None:
        """It is free again."""
        self._free.put(block)

    def write(self, descriptor: int, block: mmap.mmap, size: int, offset: int) -> Future[None]:
        """Write the first `size` bytes of a block, which is free afterwards."""
        return self._pool.submit(self._write, descriptor, block, size, offset)

    def _write(self, descriptor: int, block: mmap.mmap, size: int, offset: int) -> None:
        try:
            _put(descriptor, memoryview(block)[:size], offset)
        finally:
            self.give(block)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()


class DirectFile:
    """A new file at `path`, written from its beginning to its end. A context manager; an error in it leaves a part.

    summed  gets all bytes in order: a hash of hashlib or xxhash
    size    bytes that there will be, if that is known: blocks of a file that does not grow are written side by side
    """

    def __init__(self, path: Path, blocks: Blocks, summed: Any, size: int = 0) -> None:
        self.size = 0
        self._blocks, self._summed = blocks, summed
        self._descriptor = _opened(path)
        os.ftruncate(self._descriptor, size)
        self._block: mmap.mmap | None = None
        self._filled = 0
        self._under_way: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises the OSError of an earlier block that could not be written."""
        source = np.frombuffer(data, np.uint8)
        at = 0
        while at < len(source):
            if self._block is None:
                self._block, self._filled = self._blocks.take(), 0
            count = min(BLOCK - self._filled, len(source) - at)
            target = np.frombuffer(self._block, np.uint8, count, self._filled)
            np.copyto(target, source[at : at + count])
            del target  # a view keeps the block from being closed
            at += count
            self._filled += count
            if self._filled == BLOCK:
                self._flush()

    def _flush(self) -> None:
        block, filled = self._block, self._filled
        if block is None:
            return
        self._block = None
        self._summed.update(memoryview(block)[:filled])
        padded = -(-filled // _ALIGN) * _ALIGN
        self._under_way.append(self._blocks.write(self._descriptor, block, padded, self.size))
        self.size += filled
        self._under_way = [one for one in self._under_way if not one.done() or one.result()]

    def finish(self) -> None:
        """All of it is on the disk. Raises OSError if not."""
        self._flush()
        for one in self._under_way:
            one.result()
        self._under_way = []
        os.ftruncate(self._descriptor, self.size)
        os.fsync(self._descriptor)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._under_way:
            one.exception()  # it uses the descriptor
        if self._block is not None:
            self._blocks.give(self._block)
        os.close(self._descriptor)


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return os.open(path, flags, 0o644)


def _put(descriptor: int, data: memoryview, offset: int) -> None:
    cached = False
    while len(data):
        try:
            count = os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno not in _REFUSED or cached:
                raise
            # An alignment that this device does not take: through the cache, from now on for all blocks.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
            cached = True
            continue
        data, offset = data[count:], offset + count
