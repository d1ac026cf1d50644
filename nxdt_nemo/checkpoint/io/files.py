"""Files mapped into memory, and arrays in them.

Room checkpoint/ (leaf). A mapped page counts as the page cache's, not as the process's own memory, so reading costs no
memory that grows with the checkpoint. May import numpy and this room.
Proof: tests/checkpoint/test_torch_zip.py.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nxdt_nemo.checkpoint.boxes import Box
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType, Raw, cast
from nxdt_nemo.checkpoint.io.remote import RemotePath
from nxdt_nemo.errors import UserError

__all__ = ["Extent", "Files", "Mapped", "checked_path"]


def checked_path(path: Path) -> Path:
    """The path, if it is a file that can be read. Raises UserError naming it: absent, a folder, a cycle of links."""
    try:
        if path.is_file():
            return path
        reason = "is a folder, not a file" if path.is_dir() else "is not there"
        if path.is_symlink() and not path.exists():
            reason = "is a link to nothing, or to itself"
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(reason, place=str(path), fix="the checkpoint is not complete")


class Mapped:
    """A file in memory, private and read lazily. Closed when nothing uses it any more.

    One at a URL is not mapped: what is asked for is read then, and no more of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = checked_path(path)
        self.remote = path if isinstance(path, RemotePath) else None
        self.size: int = path.stat().st_size
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def buffer(self) -> mmap.mmap:
        """The mapping. Nothing can be written to it, nor to an array over it."""
        with self._lock:
            if self._map is None:
                try:
                    with self.path.open("rb") as file:
                        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise UserError(f"cannot be read: {error}", place=str(self.path)) from error
            return self._map

    def bytes(self, offset: int, size: int) -> bytes:
        """A copy of a few bytes. Raises UserError if the file ends before them."""
        return bytes(self.view(offset, size))

    def view(self, offset: int, size: int) -> memoryview:
        """Bytes of the file, of the mapping where there is one. Raises UserError if it ends before them."""
        self.need(offset, size)
        if self.remote is not None:
            return memoryview(self.remote.range(offset, size))
        return memoryview(self.buffer())[offset : offset + size] if size else memoryview(b"")

    def need(self, offset: int, size: int) -> None:
        """Raises UserError if the file does not have these bytes."""
        if offset < 0 or size < 0 or offset + size > self.size:
            reason = f"ends at byte {self.size}, but bytes {offset} to {offset + size} are referred to"
            raise UserError(reason, place=str(self.path), fix="the file is cut short: copy it again")


class Files:
    """Each file of a checkpoint, mapped once."""

    def __init__(self) -> None:
        self._files: dict[Path, Mapped] = {}

    def __call__(self, path: Path) -> Mapped:
        if path not in self._files:
            self._files[path] = Mapped(path)
        return self._files[path]

    def __iter__(self) -> Iterator[Mapped]:
        return iter(self._files.values())


@dataclass(frozen=True)
class Extent:
    """An array in a mapped file: dtype and shape at a byte offset, contiguous unless strides (elements) are given."""

    file: Mapped
    key: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def place(self) -> str:
        return f"{self.file.path}: {self.key}"

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, box: Box) -> Raw:
        if self.file.remote is None or self.strides is not None:
            return self.tensor()[box.inside((0,) * len(box.start))]
        return self._run(box)

    def _run(self, box: Box) -> Raw:
        """The box by reading the rows that it has, along the first axis on which it has more than one."""
        axis, last = 0, len(self.shape) - 1
        while axis < last and box.size[axis] == 1:
            axis += 1
        inner = math.prod(self.shape[axis + 1 :])
        before = sum(start * math.prod(self.shape[place + 1 :]) for place, start in enumerate(box.start[: axis + 1]))
        rows = (1,) * axis + box.size[axis : axis + 1]
        at = self.offset + before * self.dtype.itemsize
        flat = Extent(self.file, self.key, self.dtype, (math.prod(rows) * inner,), at).tensor()
        read = Box((0,) * (axis + 1) + box.start[axis + 1 :], box.size)
        return flat.reshape(rows + self.shape[axis + 1 :])[read.inside((0,) * len(box.start))]

    def tensor(self) -> Raw:
        """All of it, a view of the mapping."""
        count = math.prod(self.shape)
        if self.strides is not None and count:
            count = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.file.need(self.offset, count * self.dtype.itemsize)
        if count == 0:
            return np.empty(self.shape, self.dtype.raw)
        flat = np.frombuffer(self.file.view(self.offset, count * self.dtype.itemsize), self.dtype.raw)
        if self.strides is None:
            return flat.reshape(self.shape)
        strides = tuple(step * self.dtype.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)

    def number(self) -> float:
        """The value of an array of one element."""
        return float(cast(self.tensor(), self.dtype, FLOAT32).reshape(()))
