"""A folder that appears when it is whole: written beside its place, synced, renamed, with a manifest.

Room checkpoint/ (leaf). DST.partial/ holds what is written and a journal with a line for each finished file; a second
run with the same plan takes it up there. May import xxhash and this room.
Proof: tests/checkpoint/test_killed.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import xxhash

from nxdt_nemo import folders
from nxdt_nemo.checkpoint.formats.base import Output
from nxdt_nemo.checkpoint.io.disk import BLOCK, NewFile
from nxdt_nemo.errors import UserError

__all__ = ["JOURNAL", "MANIFEST", "Folder", "check_manifest", "digest", "same"]

MANIFEST, JOURNAL = "nxdt_manifest.json", "nxdt_journal.jsonl"
_SLACK = 64 << 20  # bytes that a file system needs beside the files'


@dataclass(frozen=True)
class Written:
    """A finished file. digest: the algorithm's name, a colon, hexadecimal digits."""

    size: int
    digest: str


class Folder:
    """A checkpoint that is being written at `target`.

    Order: open (once), write (any number of times), commit (once). A failure leaves DST.partial, which `open` with the
    same plan takes up, and never anything at `target`.

    single  the one file that is to be at `target` instead of a folder; its manifest lies beside it
    """

    def __init__(
        self, target: Path, plan: str, *, overwrite: bool = False, single: str = "", algorithm: str = "xxh3_128"
    ) -> None:
        self.target, self.plan, self.algorithm = target, plan, algorithm
        self.partial = target.with_name(target.name + ".partial")
        self.done: dict[str, Written] = {}
        self.resumed = 0
        self._overwrite, self._single = overwrite, single
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._guard = -1

    def open(self, need: int) -> None:
        """Make room and take up what an earlier run finished. Raises UserError if there is no place for it.

        need  bytes that will be written
        """
        place = str(self.target)
        replaced = self.target.with_name(self.target.name + folders.REPLACED)
        if replaced.exists() and not self.target.exists():
            reason = f"an earlier run was ended while it replaced it: what was there is {replaced.name}"
            raise UserError(reason, place=place, fix="rename that back, or move it away")
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())) and not self._overwrite:
            raise UserError("is there already", place=place, fix="choose another place, or say --overwrite")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._guard = os.open(self.partial / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("another process is writing it", place=str(self.partial), fix="wait for it") from error
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", place=str(self.partial)) from error
        self._take_up()
        missing = need - sum(written.size for written in self.done.values())
        free = shutil.disk_usage(self.partial).free
        if missing + _SLACK > free:
            reason = f"{missing / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free"
            raise UserError(reason, place=place, fix="make room, or choose another place")

    def close(self) -> None:
        """Let others write it. What is there stays for the next run."""
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    def _take_up(self) -> None:
        """Files that the journal names and that are as it says; all else goes."""
        journal = self.partial / JOURNAL
        lines = journal.read_text().splitlines() if journal.exists() else []
        known: dict[str, Written] = {}
        if lines and _parsed(lines[0]).get("plan") == self.plan:
            for line in lines[1:]:
                row = _parsed(line)
                if "path" in row:
                    known[row["path"]] = Written(row["size"], row["digest"])
        for at in sorted(self.partial.rglob("*"), reverse=True):
            name = str(at.relative_to(self.partial))
            if at.is_dir():
                if not any(at.iterdir()):
                    at.rmdir()
            elif name in known and at.stat().st_size == known[name].size and same(at, known[name].digest):
                self.done[name] = known[name]
            elif name != ".lock":
                at.unlink()
        self.resumed = len(self.done)
        rows = [{"path": name, "size": w.size, "digest": w.digest} for name, w in self.done.items()]
        text = "".join(json.dumps(row) + "\n" for row in ({"plan": self.plan}, *rows))
        journal.write_text(text)

    def write(self, outputs: Sequence[Output], workers: int, advance: Callable[[int], None]) -> None:
        """Write files, `workers` at a time. The first failure stops the others."""
        todo = [output for output in outputs if output.path not in self.done]
        advance(sum(output.size for output in outputs if output.path in self.done))
        workers = max(1, workers)
        turns = BoundedSemaphore(workers)
        # Twice as many threads as turns to make arrays: while one file waits for the disk the next is under way.
        with ThreadPoolExecutor(2 * workers, "write") as pool:
            futures = [pool.submit(self._write_or_stop, output, advance, turns) for output in todo]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()
                raise
            failed = [future for future in finished if future.exception()]
            if failed:
                self._stop.set()
                for future in futures:
                    future.cancel()
                failed[0].result()

    def _write_or_stop(self, output: Output, advance: Callable[[int], None], turns: BoundedSemaphore) -> None:
        try:
            self._write(output, advance, turns)
        except BaseException:
            self._stop.set()  # before this thread takes the next file
            raise

    def _write(self, output: Output, advance: Callable[[int], None], turns: BoundedSemaphore) -> None:
        at = self.partial / output.path
        summed = _hash(self.algorithm)
        try:
            at.parent.mkdir(parents=True, exist_ok=True)
            with NewFile(at, summed) as file:
                with turns:
                    if not self._fill(file, output, advance):
                        return
                file.finish()
        except OSError as error:
            said = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"{error.strerror}"
            raise UserError(said, place=str(at), fix="make room and run it again: it goes on from here") from error
        assert file.size == output.size, f"{output.path}: {file.size} bytes, {output.size} were announced"
        with self._lock:
            self.done[output.path] = Written(file.size, f"{self.algorithm}:{summed.hexdigest()}")
            with (self.partial / JOURNAL).open("a") as journal:
                row = {"path": output.path, "size": file.size, "digest": self.done[output.path].digest}
                journal.write(json.dumps(row) + "\n")

    def _fill(self, file: NewFile, output: Output, advance: Callable[[int], None]) -> bool:
        """Make what is in it; False if another file's failure has stopped it."""
        for piece in output.stream():
            view = memoryview(piece)
            for begin in range(0, len(view), BLOCK):
                if self._stop.is_set():
                    return False
                file.write(view[begin : begin + BLOCK])
                advance(min(BLOCK, len(view) - begin))
        return True

    def commit(self, provenance: Mapping[str, Any], order: Iterable[str]) -> None:
        """Manifest, sync, rename. `order` gives the files as the manifest lists them."""
        files = {name: {"size": self.done[name].size, "digest": self.done[name].digest} for name in order}
        manifest = {**provenance, "files": files}
        at = self.partial / MANIFEST
        at.write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (at, *(folder for folder in sorted(self.partial.rglob("*")) if folder.is_dir()), self.partial):
            folders.sync(path)
        (self.partial / JOURNAL).unlink()
        (self.partial / ".lock").unlink()
        self.close()
        if self.target.is_dir() and not self._overwrite:
            self.target.rmdir()  # empty, unless somebody has come to use it since
        if self._single:
            folders.commit(self.partial / self._single, self.target)
            folders.commit(at, manifest_of(self.target))
            shutil.rmtree(self.partial)
        else:
            folders.commit(self.partial, self.target)


def manifest_of(target: Path) -> Path:
    """Where the manifest of a checkpoint is: in its folder, or beside its file."""
    return target / MANIFEST if target.is_dir() else target.with_name(target.name + ".manifest.json")


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # the line that a kill cut short
        return {}
    return row if isinstance(row, dict) else {}


def _hash(algorithm: str) -> Any:
    """XXH3 finds damage at the speed of memory. It is no seal, and needs none: who can change a file can change the
    manifest beside it; SHA-256 is for those whose archive asks for it."""
    return xxhash.xxh3_128() if algorithm == "xxh3_128" else hashlib.new(algorithm)


def digest(path: Path, algorithm: str, given_up: threading.Event | None = None) -> str:
    """A file's digest, with the algorithm's name before it; "" once given_up is set."""
    summed = _hash(algorithm)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            if given_up is not None and given_up.is_set():
                return ""
            summed.update(block)
    return f"{algorithm}:{summed.hexdigest()}"


def same(path: Path, said: str) -> bool:
    """True if the file has this digest. Raises ValueError for an algorithm that is not known."""
    return digest(path, said.partition(":")[0]) == said


def check_manifest(path: Path) -> list[str]:
    """What of a folder is not as its manifest says, a line each; [] if all is or there is no manifest."""
    at = manifest_of(path)
    if not at.is_file():
        return []
    try:
        files = json.loads(at.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"is damaged: {error}", place=str(at)) from error
    wrong = []
    for name, row in files.items():
        file = path / name if path.is_dir() else path
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != row["size"]:
            wrong.append(f"{name} has {file.stat().st_size} bytes instead of {row['size']}")
        elif not same(file, row["digest"]):
            wrong.append(f"{name} is damaged: its digest is not the manifest's")
    return wrong
