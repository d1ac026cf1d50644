"""torch.save's files: read in place, and written without holding what is in them.

Room checkpoint/ (leaf). Such a file is an uncompressed zip of a pickle (`data.pkl`) and one entry a storage, aligned to
64 bytes; in a `.distcp` file each item is one, at an offset. Pickles are read by io/unpickle.py. What is written here
torch.load reads, mapped or not, with `weights_only` where the content allows it. May import numpy and this room.
Proof: tests/checkpoint/test_torch_zip.py.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nxdt_nemo.checkpoint.dtypes import DType, Raw
from nxdt_nemo.checkpoint.io import unpickle
from nxdt_nemo.checkpoint.io.files import Extent, Mapped
from nxdt_nemo.checkpoint.io.pickling import Makes, Pending, dumps
from nxdt_nemo.errors import UserError

__all__ = ["Zip", "entries", "one_tensor", "raw_bytes", "read", "verify"]

_LOCAL, _CENTRAL, _END, _END64, _WHERE64 = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ALIGN = 64
_SMALL = 0xFFFFFFFF
_WHOLE = 256 << 20  # bytes of the largest tensor that is made in one


@dataclass(frozen=True)
class Entry:
    """A file in a zip: where its bytes are, and what they should sum up to."""

    offset: int
    size: int
    crc: int


def entries(file: Mapped, offset: int = 0, length: int | None = None) -> dict[str, Entry]:
    """The zip's table, names without the archive's folder. Raises UserError for anything but torch.save's form."""
    length = file.size - offset if length is None else length
    file.need(offset, length)
    tail_at = offset + max(0, length - 66_000)
    tail = file.bytes(tail_at, offset + length - tail_at)
    at = tail.rfind(_END)
    place = str(file.path)
    if at < 0 or length < 22:
        cut = "ends without a zip's table" if file.bytes(offset, 4) == _LOCAL else "is no torch.save file"
        raise UserError(cut, place=place, fix="the file is cut short or was written by torch < 1.6")
    try:
        count, size, begin = struct.unpack_from("<HII", tail, at + 10)
        if _SMALL in (size, begin) or count == 0xFFFF:
            end64 = tail.rfind(_END64, 0, at)
            count, size, begin = struct.unpack_from("<QQQ", tail, end64 + 32)
        table, found, here = file.bytes(offset + begin, size), {}, 0
        for _ in range(count):
            name, entry, here = _central(file, offset, table, here)
            found[name.partition("/")[2]] = entry
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"has a damaged zip table: {error}", place=place, fix="copy the file again") from error
    return found


def _central(file: Mapped, offset: int, table: bytes, at: int) -> tuple[str, Entry, int]:
    if table[at : at + 4] != _CENTRAL:
        raise IndexError("an entry is missing")
    method, crc, packed, size = struct.unpack_from("<H4xIII", table, at + 10)
    names, extras, comments = struct.unpack_from("<HHH", table, at + 28)
    (local,) = struct.unpack_from("<I", table, at + 42)
    name = table[at + 46 : at + 46 + names].decode()
    extra, spot = table[at + 46 + names : at + 46 + names + extras], 0
    while spot + 4 <= len(extra):
        tag, span = struct.unpack_from("<HH", extra, spot)
        if tag == 1:
            wide, inner = extra[spot + 4 : spot + 4 + span], 0
            if size == _SMALL:
                (size,), inner = struct.unpack_from("<Q", wide, inner), inner + 8
            if packed == _SMALL:
                (packed,), inner = struct.unpack_from("<Q", wide, inner), inner + 8
            if local == _SMALL:
                (local,) = struct.unpack_from("<Q", wide, inner)
        spot += 4 + span
    if method or packed != size:
        raise IndexError(f"{name} is compressed")
    head = file.bytes(offset + local, 30)
    if head[:4] != _LOCAL:
        raise IndexError(f"{name} is not where the table says")
    named, extended = struct.unpack_from("<HH", head, 26)
    begin = offset + local + 30 + named + extended
    file.need(begin, size)
    return name, Entry(begin, size, crc), at + 46 + names + extras + comments


def read(file: Mapped, offset: int = 0, length: int | None = None, also: dict[str, Any] | None = None) -> Any:
    """What torch.load would give, with an Extent for each tensor.

    offset, length  the item's place in the file; all of it by default
    Raises UserError for a damaged file and for a pickle that asks for what is not on the list.
    """
    table = entries(file, offset, length)
    place = str(file.path)
    if "data.pkl" not in table:
        raise UserError("has no data.pkl: it is no torch.save file", place=place)
    if (order := table.get("byteorder")) and file.bytes(order.offset, order.size) != b"little":
        raise UserError("was written by a big-endian machine", place=place)

    def storage(reference: Any) -> unpickle.StorageRef:
        word, kind, key, _, count = reference
        entry = table.get(f"data/{key}")
        if word != "storage" or entry is None:
            raise UserError(f"storage {key} is not in the file", place=place, fix="copy the file again")
        if count * kind.dtype.itemsize > entry.size:
            raise UserError(f"storage {key} has {entry.size} bytes for {count} {kind.name}", place=place)
        return unpickle.StorageRef(Extent(file, f"data/{key}", kind.dtype, (int(count),), entry.offset))

    pickled = table["data.pkl"]
    _check(file, "data.pkl", pickled)
    return unpickle.load(file.bytes(pickled.offset, pickled.size), place, storage, also)


def verify(file: Mapped, offset: int = 0, length: int | None = None) -> None:
    """Raises UserError if an entry's bytes are not those that were written; torch.load does not look."""
    for name, entry in entries(file, offset, length).items():
        _check(file, name, entry)


def _check(file: Mapped, name: str, entry: Entry) -> None:
    view = file.view(entry.offset, entry.size)
    if zlib.crc32(view) != entry.crc and entry.crc:
        raise UserError(f"{name} is damaged: its checksum does not match", place=str(file.path), fix="copy it again")


@dataclass
class Zip:
    """A file that torch.load reads, made of a value in which Pending stands for tensors that come later.

    value    what is saved
    archive  the folder's name in the zip; torch takes the file's
    """

    value: Any
    archive: str = "archive"
    pending: list[Pending] = field(init=False)
    _heads: list[tuple[str, bytes]] = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.value, Pending):
            pickled, self.pending = _of_one(self.value.dtype, self.value.shape, self.value.nbytes), [self.value]
        else:
            pickled, self.pending = dumps(self.value)
        self._heads = [("data.pkl", pickled), ("byteorder", b"little")]

    def _entries(self) -> list[tuple[str, bytes | Pending]]:
        tensors = [(f"data/{number}", wanted) for number, wanted in enumerate(self.pending)]
        return [*self._heads, *tensors, ("version", b"3\n")]

    @property
    def length(self) -> int:
        """Bytes of the whole file, known before a tensor is."""
        at, table = 0, 0
        for name, content in self._entries():
            size = content.nbytes if isinstance(content, Pending) else len(content)
            head = _local(f"{self.archive}/{name}", at, size, 0)
            table += len(_directory(f"{self.archive}/{name}", at, size, 0))
            at += len(head) + size
        return at + table + len(_ending(len(self._entries()), table, at))

    def stream(self) -> Iterator[bytes | memoryview]:
        """The file's bytes; tensors are made one at a time."""
        at, table, count = 0, [], 0
        for name, content in self._entries():
            parts, full = _parts(content), f"{self.archive}/{name}"
            crc = size = 0
            for part in parts():
                crc, size = zlib.crc32(part, crc), size + len(part)
            if isinstance(content, Pending) and size != content.nbytes:
                raise AssertionError(f"{name}: {size} bytes, {content.nbytes} were announced")
            head = _local(full, at, size, crc)
            table.append(_directory(full, at, size, crc))
            yield head
            yield from parts()
            at += len(head) + size
            count += 1
        whole = b"".join(table)
        yield whole
        yield _ending(count, len(whole), at)


@runtime_checkable
class Pieces(Protocol):
    """What gives a tensor in parts, if it is larger than what may be in memory. They are made twice: their checksum
    stands before them."""

    def pieces(self) -> Iterator[Raw]: ...


def _parts(content: bytes | Pending) -> Callable[[], Iterable[bytes | memoryview]]:
    """The bytes of an entry, again at each call."""
    if isinstance(content, Pending) and content.nbytes > _WHOLE and isinstance(content.what, Pieces):
        made = content.what
        return lambda: map(raw_bytes, made.pieces())
    whole = (raw_bytes(content.what.tensor()) if isinstance(content, Pending) else content,)
    return lambda: whole


class _Later:
    """Of a pickle that is wanted without its tensor."""

    def tensor(self) -> Raw:
        raise AssertionError("this tensor is not written")


@lru_cache(1024)
def _of_one(dtype: DType, shape: tuple[int, ...], nbytes: int) -> bytes:
    """The pickle of a single tensor: chunks of one size have the same, and there are thousands of them."""
    return dumps(Pending(_Later(), dtype, shape, nbytes))[0]


def raw_bytes(array: Raw) -> memoryview:
    """An array's elements in C order; of the array itself if it is contiguous."""
    if not array.size:
        return memoryview(b"")
    content: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(content)


def _local(name: str, at: int, size: int, crc: int) -> bytes:
    """A local header that ends where 64 divides the position; sizes of 4 GB and more in a zip64 field."""
    encoded = name.encode()
    wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _SMALL else b""
    gap = -(at + 30 + len(encoded) + len(wide) + 4) % _ALIGN
    extra = wide + b"FB" + struct.pack("<H", gap) + b"Z" * gap
    shown = _SMALL if wide else size
    head = _LOCAL + struct.pack(
        "<HHHHHIIIHH", 45 if wide else 0, 0, 0, 0, 0, crc, shown, shown, len(encoded), len(extra)
    )
    return head + encoded + extra


def _directory(name: str, at: int, size: int, crc: int) -> bytes:
    encoded = name.encode()
    fields = [size, size] if size >= _SMALL else []
    fields += [at] if at >= _SMALL else []
    extra = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
    shown, spot = min(size, _SMALL), min(at, _SMALL)
    return (
        _CENTRAL
        + struct.pack(
            "<HHHHHHIIIHHHHHII", 45, 45, 0, 0, 0, 0, crc, shown, shown, len(encoded), len(extra), 0, 0, 0, 0, spot
        )
        + encoded
        + extra
    )


def _ending(count: int, size: int, at: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or size >= _SMALL or at >= _SMALL:
        wide = _END64 + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, at)
        wide += _WHERE64 + struct.pack("<IQI", 0, at + size, 1)
    small = (min(count, 0xFFFF), min(count, 0xFFFF), min(size, _SMALL), min(at, _SMALL))
    return wide + _END + struct.pack("<HHHHIIH", 0, 0, *small, 0)


def one_tensor(what: Makes, dtype: DType, shape: Sequence[int]) -> Zip:
    """torch.save of a single tensor, an item of a `.distcp` file."""
    return Zip(Pending(what, dtype, tuple(shape), math.prod(shape) * dtype.itemsize))
