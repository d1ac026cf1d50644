"""Files mapped into memory, and arrays in them.

Room checkpoint/ (leaf). A mapped page counts as the page cache's, not as the process's own memory, so reading costs no
memory that grows with the checkpoint. May import torch, fsspec when a path is a URL, and this room.
Proof: tests/checkpoint/test_torch_zip.py.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nxdt_nemo.checkpoint.boxes import Box
from nxdt_nemo.errors import UserError

__all__ = ["DTYPES", "Extent", "Files", "Mapped", "checked_path", "name_of"]

# The names of safetensors, which are also ours in tables.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def name_of(dtype: torch.dtype) -> str:
    """BF16 for torch.bfloat16."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


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
    """A file in memory, private and read lazily. Closed when nothing uses it any more."""

    def __init__(self, path: Path) -> None:
        self.path = checked_path(path)
        self.size = path.stat().st_size
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def buffer(self) -> mmap.mmap:
        """The mapping. Copy-on-write, so that tensors over it are torch's ordinary, writable ones."""
        with self._lock:
            if self._map is None:
                try:
                    with self.path.open("rb") as file:
                        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise UserError(f"cannot be read: {error}", place=str(self.path)) from error
            return self._map

    def bytes(self, offset: int, size: int) -> bytes:
        """A copy of a few bytes. Raises UserError if the file ends before them."""
        self.need(offset, size)
        return self.buffer()[offset : offset + size] if size else b""

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
    dtype: torch.dtype
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

    def read(self, box: Box) -> torch.Tensor:
        return self.tensor()[box.inside((0,) * len(box.start))]

    def tensor(self) -> torch.Tensor:
        """All of it, a view of the mapping."""
        count = math.prod(self.shape)
        if self.strides is not None and count:
            count = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.file.need(self.offset, count * self.dtype.itemsize)
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.offset % self.dtype.itemsize:  # torch wants elements aligned
            raw = bytearray(self.file.bytes(self.offset, count * self.dtype.itemsize))
            flat = torch.frombuffer(raw, dtype=self.dtype)
        else:
            flat = torch.frombuffer(self.file.buffer(), dtype=self.dtype, count=count, offset=self.offset)
        return flat.view(self.shape) if self.strides is None else flat.as_strided(self.shape, self.strides)
