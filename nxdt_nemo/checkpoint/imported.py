"""Checkpoints of other tools as ones that a run can read: converted once, kept, and found again by the source's digest.

Room checkpoint/ (leaf). Any number of ranks and runs may ask at once: the first converts, the others wait for it at a
lock beside the place. What a killed one wrote is taken up. May import xxhash and this room.
Proof: tests/checkpoint/test_imported.py, tests/nemo/test_restore.py.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.convert import MAPPING_VERSION, Report, convert
from nxdt_nemo.checkpoint.formats.base import Options, Source, Target
from nxdt_nemo.checkpoint.formats.megatron import TRACKER, folder_of
from nxdt_nemo.errors import UserError

__all__ = ["Imported", "digest_of", "imported"]

_MARK = ".imported-"
_ENDS = 64 << 10  # bytes read of a large file's beginning and end


@dataclass(frozen=True)
class Imported:
    """Where the checkpoint is that the run is to read; report is None if it was there already."""

    path: Path
    report: Report | None = None


def digest_of(path: Path, *also: object) -> str:
    """16 digits that say which files these are and what is made of them.

    Names, sizes, times of change, small files whole and the two ends of large ones: every rank of every run does this,
    and reading all of a large checkpoint would take as long as importing it.
    """
    summed = xxhash.xxh3_64(repr((MAPPING_VERSION, *also)).encode())
    root = folder_of(path, None) if (path / TRACKER).is_file() else path
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if not file.is_file():
            continue
        status = file.stat()
        summed.update(repr((str(file.relative_to(root)), status.st_size, status.st_mtime_ns)).encode())
        with file.open("rb") as data:
            summed.update(data.read(_ENDS))
            if status.st_size > 2 * _ENDS:
                data.seek(-_ENDS, os.SEEK_END)
            summed.update(data.read(_ENDS))
    return summed.hexdigest()


def imported(
    path: Path,
    to: str,
    places: Sequence[Path],
    options: Options,
    target: Callable[[Source], Target],
    *,
    key: object = "",
    check: Callable[[Source], None] = lambda source: None,
    say: Callable[[str], None] = lambda text: None,
    version: str = "",
    workers: int = 2,
) -> Imported:
    """The checkpoint at `path` as format `to`, made in the first of `places` that can be written if none has it.

    target  what to write, once the source has been looked at; key, whatever of it changes the tensors' values
    check   may refuse the source; called before anything is written, and not for what is there already
    say     is told when this process has to wait for another
    Raises UserError if it cannot be read or converted, or no place can be written.
    """
    if not path.exists():
        raise UserError("is not there", place=str(path), fix="name a checkpoint")
    name = f"{path.name}{_MARK}{digest_of(path, to, options, key)}"
    found = _there(name, places)
    if found is not None:
        return Imported(found)
    with _locked(_writable(places), name, say) as place:
        found = _there(name, places)  # another rank has made it meanwhile
        if found is not None:
            return Imported(found)
        source = formats.read(path, options)
        check(source)
        consumed = source.training.consumed
        # NeMo reads how far the data is from the name of what it resumes.
        full = f"{name}-consumed_samples={consumed}.0" if options.optimizer and consumed is not None else name
        report = convert(path, place / full, to, options, target(source), version=version, workers=workers)
        return Imported(place / full, report)


def _there(name: str, places: Sequence[Path]) -> Path | None:
    for place in places:
        for at in sorted(place.glob(f"{_escaped(name)}*")):
            if at.is_dir() and at.suffix != ".partial":
                return at
    return None


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "[*?" else letter for letter in name)


def _writable(places: Sequence[Path]) -> Path:
    for place in places:
        above = next((at for at in (place, *place.parents) if at.exists()), place)
        if os.access(above, os.W_OK | os.X_OK):
            place.mkdir(parents=True, exist_ok=True)
            return place
    said = " nor ".join(map(str, places))
    raise UserError("cannot be written, and the import has to be kept somewhere", place=said, fix="make one writable")


@contextmanager
def _locked(place: Path, name: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The place, while no other process has this name's lock there. The file goes with the last that holds it."""
    at = place / f".{name}.lock"
    waits = False
    while True:
        handle = os.open(at, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if not waits:
                say(f"waiting for another process that imports {name}")
                waits = True
            time.sleep(0.2)
            continue
        except OSError as error:
            os.close(handle)
            fix = "convert it beforehand: nxdt-nemo ckpt convert"
            raise UserError(f"cannot be locked: {error.strerror}", place=str(at), fix=fix) from error
        try:
            if os.fstat(handle).st_ino != _inode(at):  # the one before took its file away
                continue
            try:
                yield place
            finally:
                at.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1
