"""What there is to know of a checkpoint without reading its tensors.

Room checkpoint/ (leaf). May import this room. Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.formats.base import Options, Source
from nxdt_nemo.checkpoint.io.unpickle import plain
from nxdt_nemo.checkpoint.output import MANIFEST
from nxdt_nemo.checkpoint.tensors import KINDS, logical_of
from nxdt_nemo.errors import UserError

__all__ = ["Tensor", "inspect", "summary", "tensors"]


@dataclass(frozen=True)
class Tensor:
    """A logical tensor and where it lies.

    where  the files that have a part of it, by their names in the checkpoint
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    where: tuple[str, ...]


def inspect(path: Path, options: Options) -> Source:
    """The source with its optimizer state if that can be read; a note says so where it cannot."""
    try:
        return formats.read(path, dataclasses.replace(options, optimizer=True))
    except UserError as error:
        source = formats.read(path, dataclasses.replace(options, optimizer=False))
        source.notes.append(f"optimizer: {error.reason}")
        return source


def tensors(source: Source) -> list[Tensor]:
    """All logical tensors, in the order in which they were found."""
    found = []
    for kind in KINDS:
        for name in source.catalog.names(kind):
            blocks = source.catalog.blocks(kind, name)
            files = dict.fromkeys(block.array.place.rpartition(": ")[0] for block in blocks)
            where = tuple(_relative(file, source.path) for file in files)
            shape = logical_of(name).size(source.model)
            found.append(Tensor(kind, name, shape, blocks[0].array.dtype.code, where))
    return found


def _relative(file: object, root: Path) -> str:
    return str(file).removeprefix(f"{root}/")


def summary(source: Source) -> dict[str, Any]:
    """All of it, as JSON takes it."""
    listed, training = tensors(source), source.training
    weights = [tensor for tensor in listed if tensor.kind == "model"]
    sizes = [file.stat().st_size for file in source.files]  # a request each, of files at a URL
    return {
        "path": str(source.path),
        "format": source.format,
        "family": source.family.name,
        "model": dataclasses.asdict(source.model),
        "layout": dataclasses.asdict(source.layout),
        "detail": plain(source.detail),
        "iteration": training.iteration,
        "consumed_samples": training.consumed,
        "optimizer": {
            "state": sorted(kind for kind in source.catalog.kinds() if kind != "model"),
            "step": training.step,
            "groups": plain(training.groups),
        },
        "dtypes": sorted({tensor.dtype for tensor in weights}),
        "parameters": sum(math.prod(tensor.shape) for tensor in weights),
        "tensors": [dataclasses.asdict(tensor) for tensor in listed],
        "files": {_relative(file, source.path): size for file, size in zip(source.files, sizes, strict=True)},
        "bytes": sum(sizes),
        "arguments": plain(training.args),
        "manifest": _manifest(source.path),
        "notes": source.notes,
    }


def _manifest(path: Path) -> dict[str, Any] | None:
    """Provenance that a conversion of ours left, beside the folder or above it."""
    for at in (path / MANIFEST, path.parent / MANIFEST):
        if at.is_file():
            try:
                found = json.loads(at.read_text())
            except ValueError:
                return {"damaged": str(at)}
            return {key: found.get(key) for key in ("written_by", "mapping_version", "source", "kinds")}
    return None
