"""megatron-core's `zarr` (version 2): a folder of raw chunks for each whole-model tensor, and common.pt. Read only.

Room checkpoint/ (leaf). Chunks are uncompressed and little-endian, `bfloat16` being a dtype of tensorstore's that zarr
itself does not know. A chunk that is not there is an error here; zarr and tensorstore give zeros for it. Optimizer
state has the parameter's shape, of a distributed optimizer too; KEY.sync holds the empty lock files with which ranks
took turns at it.
May import this room. Proof: tests/checkpoint/test_fixtures.py.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint.boxes import Box, whole
from nxdt_nemo.checkpoint.catalog import Reshaped
from nxdt_nemo.checkpoint.dtypes import BY_NAME
from nxdt_nemo.checkpoint.formats import distributed, megatron
from nxdt_nemo.checkpoint.formats.base import Options, Reader, Source
from nxdt_nemo.checkpoint.formats.hf import read_json
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.errors import UserError

__all__ = ["READERS", "WRITERS", "ZarrReader"]

ARRAY, COMMON, LOCKS = ".zarray", "common.pt", ".sync"
_DTYPES = {
    "bfloat16": "bfloat16",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<i4": "int32",
    "<i8": "int64",
    "|u1": "uint8",
}


class ZarrReader(Reader):
    """Reads what megatron-core 0.3 to 0.13 wrote with the backend `zarr`."""

    format = "zarr"

    def looks_like(self, path: Path) -> bool:
        try:
            folder = megatron.folder_of(path, None)
        except UserError:
            return False
        return folder.is_dir() and any((at / ARRAY).exists() for at in folder.iterdir())

    def read(self, path: Path, options: Options) -> Source:
        folder = megatron.folder_of(path, options.step)
        files = Files()
        arrays = sorted(at for at in folder.iterdir() if (at / ARRAY).exists() and at.suffix != LOCKS)
        items = {at.name: _item(at, files) for at in arrays}
        common = torch_zip.read(files(folder / COMMON)) if (folder / COMMON).exists() else {}
        listed = sorted({file.path for file in files} | {at / ARRAY for at in arrays})
        return distributed.build(self.format, folder, items, common, options, listed)


def _item(folder: Path, files: Files) -> distributed.Item:
    place = folder / ARRAY
    said = read_json(place)
    try:
        shape, size = tuple(map(int, said["shape"])), tuple(map(int, said["chunks"]))
        dtype = BY_NAME.get(_DTYPES.get(str(said["dtype"]), ""))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"is not understood: {error!r}", place=str(place)) from error
    for key, wanted in (("zarr_format", 2), ("compressor", None), ("filters", None), ("order", "C")):
        if said.get(key) != wanted:
            raise UserError(f"{key} is {said.get(key)!r}", place=str(place), fix="only raw chunks of zarr 2 are read")
    if dtype is None or len(size) != len(shape) or not all(n > 0 for n in size):
        raise UserError(f"dtype {said['dtype']} or chunks {list(size)} are not known", place=str(place))
    item = distributed.Item(shape, dtype)
    for index in product(*(range(-(-n // c)) for n, c in zip(shape, size, strict=True))):
        item.chunks.append(_chunk(folder, files, index, shape, size, dtype))
    return item


def _chunk(
    folder: Path, files: Files, index: tuple[int, ...], shape: tuple[int, ...], size: tuple[int, ...], dtype: Any
) -> tuple[Box, Any]:
    """A chunk's file holds all of its size, also where it reaches over the array's end."""
    path = folder / (".".join(map(str, index)) or "0")
    file = files(path)
    count = math.prod(size) * dtype.itemsize
    if file.size != count:
        raise UserError(f"has {file.size} bytes, a chunk has {count}", place=str(path), fix="copy the file again")
    start = tuple(i * n for i, n in zip(index, size, strict=True))
    inside = tuple(min(n, s - b) for n, s, b in zip(size, shape, start, strict=True))
    extent = Extent(file, folder.name, dtype, size, 0)
    box = Box(start, inside)
    return box, extent if inside == size else Reshaped(extent, whole(inside), inside)


READERS = {"zarr": ZarrReader}
WRITERS: dict[str, Any] = {}
