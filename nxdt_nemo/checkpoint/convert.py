"""From one checkpoint to another: read what is there, plan all of it, write it piece by piece, commit.

Room checkpoint/ (leaf). Memory: `workers` times the largest array that is written, 256 MB at most; what is
a contiguous part of a source file is written from the mapped file and costs none.
May import this room. Proof: tests/checkpoint/test_fixtures.py, test_cli.py.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType
from nxdt_nemo.checkpoint.formats.base import Options, Output, Source, Target
from nxdt_nemo.checkpoint.output import Folder
from nxdt_nemo.checkpoint.output import digest as digest_of
from nxdt_nemo.errors import UserError

__all__ = ["MAPPING_VERSION", "Report", "convert"]

# Raised when a family's or dialect's table changes what is written.
MAPPING_VERSION = 3
Progress = Callable[[int, int], None]  # bytes done, bytes of all


@dataclass
class Report:
    """What was done.

    source   what was read, and in its catalog what of it was written: main parameters may stand for the weights
    weights  the dtype of the weights that were read
    """

    source: Source
    weights: DType
    target: Path
    bytes: int
    seconds: float
    resumed: int
    kinds: tuple[str, ...] = ("model",)
    notes: list[str] = field(default_factory=list)


def convert(
    path: Path,
    target: Path,
    to: str,
    options: Options | None = None,
    wanted: Target | None = None,
    *,
    version: str = "",
    workers: int = 2,
    overwrite: bool = False,
    digest: str = "xxh3_128",
    progress: Progress | None = None,
    change: Callable[[Source], None] | None = None,
) -> Report:
    """Write the checkpoint at `path` as format `to` at `target`. Raises UserError, and then `target` is as it was.

    workers  files made at a time
    digest   of each file read and written, xxh3_128 or sha256, for the manifest; version, too
    change   what is to become of the source before it is written: an adapter that is merged into it
    """
    started = time.monotonic()
    wanted = wanted or Target()
    options = options or Options(optimizer=len(wanted.kinds) > 1)
    target = target.absolute()
    if target == path.absolute() or path.absolute() in target.parents:
        raise UserError("is the source, or inside of it", place=str(target), fix="choose another place")
    source = formats.read(path, options)
    if change is not None:
        change(source)
    writer = formats.writer(to)
    weights = source.dtype
    wanted = _with_masters(source, wanted)
    single = target.name if writer.single and target.name.endswith(writer.single) else ""
    if single:
        wanted = replace(wanted, extra={**wanted.extra, "single": single})
    outputs = list(writer.outputs(source, wanted))
    before = _fingerprints(source)
    total = sum(output.size for output in outputs)
    plan = _plan(source, to, options, wanted, outputs, before)
    folder = Folder(target, plan, overwrite=overwrite, single=single, algorithm=digest)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    try:
        folder.open(total)
        given_up = threading.Event()
        with ThreadPoolExecutor(2, "beside") as pool:
            later = pool.submit(lambda: list(writer.last()))
            read = pool.submit(_digests, source, digest, given_up)
            try:
                folder.write(outputs, workers, advance)
            except BaseException:  # Ctrl-C waits for no digest
                given_up.set()
                raise
        for last in later.result():
            folder.write([last], 1, lambda _: None)
            outputs.append(last)
        if _fingerprints(source) != before:
            raise UserError("changed while it was read", place=str(path), fix="convert it when nothing writes to it")
        files = {file: {**status, **read.result().get(file, {})} for file, status in before.items()}
        folder.commit(_provenance(source, to, wanted, files, version), [output.path for output in outputs])
    finally:
        folder.close()
    return Report(
        source, weights, target, total, time.monotonic() - started, folder.resumed, wanted.kinds, source.notes
    )


def _with_masters(source: Source, wanted: Target) -> Target:
    """What to write of the optimizer: float32 weights are their own main parameters, others have a copy in float32.

    Raises UserError if the source lacks a kind that is wanted.
    """
    if wanted.kinds == ("model",):
        return wanted
    there = source.catalog.kinds()
    for kind in wanted.kinds:
        if kind not in there and kind != "fp32_param":
            raise UserError(f"has no {kind}", place=str(source.path), fix="leave out --with-optimizer")
    narrow = (wanted.dtype or source.dtype) != FLOAT32
    if "fp32_param" in there and not narrow:
        source.catalog.rename("fp32_param", "model")
    elif "fp32_param" not in there and narrow:
        if source.dtype != FLOAT32:
            raise UserError("has no float32 main parameters", place=str(source.path), fix="leave out --with-optimizer")
        source.catalog.copy("model", "fp32_param")
    kinds = tuple(kind for kind in wanted.kinds if narrow or kind != "fp32_param")
    return replace(wanted, kinds=kinds)


def _fingerprints(source: Source) -> dict[str, dict[str, int]]:
    found = {}
    for file in source.files:
        status = file.stat()
        found[str(file)] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return found


def _digests(source: Source, algorithm: str, given_up: threading.Event) -> dict[str, dict[str, str]]:
    """Of the files that were read. Of one at a URL there is none: it would be sent a second time."""
    local = [file for file in source.files if isinstance(file, Path)]
    return {str(file): {"digest": digest_of(file, algorithm, given_up)} for file in local}


def _plan(
    source: Source, to: str, options: Options, wanted: Target, outputs: list[Output], files: dict[str, dict[str, int]]
) -> str:
    said = [MAPPING_VERSION, to, repr(options), repr(wanted), files, repr(source.model)]
    said += [[output.path, output.size] for output in outputs]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _provenance(
    source: Source, to: str, wanted: Target, files: dict[str, dict[str, Any]], version: str
) -> dict[str, Any]:
    return {
        "format": to,
        "family": source.family.name,
        "model": asdict(source.model),
        "layout": asdict(wanted.layout),
        "dtype": str(wanted.dtype or "as in the source"),
        "kinds": list(wanted.kinds),
        "source": {"path": str(source.path), "format": source.format, "files": files},
        "written_by": f"nxdt-nemo {version}".strip(),
        "mapping_version": MAPPING_VERSION,
    }
