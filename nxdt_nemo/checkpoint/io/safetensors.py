"""Safetensors files, read as views of the mapped file and written in one pass.

Room checkpoint/ (leaf). The package `safetensors` wants all tensors of a file in memory to write it, and copies what
it reads; the layout is eight bytes, a JSON header and the bytes. Checked against the package in
tests/checkpoint/test_safetensors.py. May import this room.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nxdt_nemo.checkpoint.dtypes import BY_CODE, DType
from nxdt_nemo.checkpoint.io.files import Extent, Mapped
from nxdt_nemo.errors import UserError

__all__ = ["header", "read"]

_LARGEST_HEADER = 100_000_000


def read(file: Mapped) -> dict[str, Extent]:
    """The file's arrays. Raises UserError if header and size do not agree."""
    place = str(file.path)
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > min(_LARGEST_HEADER, file.size - 8):
        raise UserError(f"its header claims {length} bytes of {file.size}", place=place, fix="the file is cut short")
    try:
        table: dict[str, Any] = json.loads(file.bytes(8, length))
        found = {key: _extent(file, key, row, 8 + length) for key, row in table.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"is no safetensors file: {error}", place=place) from error
    end = max((at.offset + at.nbytes for at in found.values()), default=8 + length)
    if end != file.size:
        raise UserError(f"has {file.size} bytes, its header says {end}", place=place, fix="copy the file again")
    return found


def _extent(file: Mapped, key: str, row: Mapping[str, Any], base: int) -> Extent:
    begin, end = row["data_offsets"]
    if row["dtype"] not in BY_CODE:
        raise UserError(f"dtype {row['dtype']} of {key} is not known", place=str(file.path))
    extent = Extent(file, key, BY_CODE[row["dtype"]], tuple(map(int, row["shape"])), base + begin)
    if extent.nbytes != end - begin or begin < 0:
        raise UserError(f"{key}: {end - begin} bytes for shape {row['shape']} {row['dtype']}", place=str(file.path))
    return extent


def header(arrays: Sequence[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """What comes before the bytes of these arrays, which follow in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, dtype, shape in arrays:
        size = math.prod(shape) * dtype.itemsize
        table[key] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
