"""What a compilation cache holds: Neuron's persistent cache, or torch-xla's on XLA:CPU, on disk or behind a URL.

Room audit/. Neuron's: a folder neuronxcc-VERSION, in it one MODULE_HASH+FLAGS a graph with the graph (*.pb), the
compiled one (*.neff), a log where it failed, a lock while someone compiles; as AWS's "Neuron Persistent Cache" shows
it. torch-xla's: one file a graph, named by a number. Uses fsspec for URLs. Proof: tests/audit/test_compile.py.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from nxdt_nemo.errors import UserError, one_line

__all__ = ["DEFAULT", "STALE", "Graph", "Lock", "State", "contents", "counted"]

DEFAULT = "/var/tmp/neuron-compile-cache"
"""Where Neuron keeps its cache when nobody says otherwise."""

STALE = 3600.0
"""Seconds after which a lock counts as left behind. A large graph may take longer: look before deleting."""

Lock = Literal["", "locked", "stale lock"]
State = Literal["compiled", "waiting", "failed", "locked", "stale lock"]


@dataclass(frozen=True)
class Graph:
    """One graph of a cache.

    name      as the cache calls it
    compiler  the version that its folder names, "torch-xla" for torch-xla's own
    state     compiled; waiting (extracted, not compiled); failed; locked (someone compiles it); stale lock
    size      bytes of all its files
    age       seconds since its newest file was written
    lock      of its own, beside a compiled graph too; "" without one
    """

    name: str
    compiler: str
    state: State
    size: int
    age: float
    lock: Lock = ""


@dataclass
class _Files:
    """The files of one MODULE folder."""

    names: list[str] = field(default_factory=list)
    size: int = 0
    newest: float = 0.0
    locked: float | None = None

    def has(self, *endings: str) -> bool:
        return any(name.endswith(endings) for name in self.names)

    def lock(self, now: float) -> Lock:
        if self.locked is None:
            return ""
        return "stale lock" if now - self.locked > STALE else "locked"

    def state(self, now: float) -> State:
        """With a lock, a graph is compiled once .done says that its .neff is whole."""
        lock = self.lock(now)
        if self.has(".neff") and (not lock or self.has(".done")):
            return "compiled"
        return lock or ("failed" if self.has(".log", ".done") else "waiting")


def contents(url: str, *, now: float | None = None) -> list[Graph]:
    """The graphs of a cache, largest first.

    url  a folder, or an address that fsspec knows (s3:// needs the extra s3)
    Raises UserError when it is not there or cannot be read.
    """
    now = time.time() if now is None else now
    entries = list(_walk(url))
    modules: dict[tuple[str, str], _Files] = {}
    found = []
    for path, size, written in entries:
        parts = PurePosixPath(path).parts
        at = next((index for index, part in enumerate(parts) if part.startswith("MODULE_")), None)
        if at is not None:
            compiler = parts[at - 1] if at else ""
            files = modules.setdefault((compiler, parts[at]), _Files())
            files.size += size
            files.newest = max(files.newest, written)
            files.names.append(parts[-1])
            if parts[-1].endswith(".lock"):
                files.locked = written
        elif re.fullmatch(r"\d{8,}", parts[-1]):
            found.append(Graph(parts[-1], "torch-xla", "compiled", size, now - written))
    for (compiler, name), files in modules.items():
        found.append(Graph(name, compiler, files.state(now), files.size, now - files.newest, files.lock(now)))
    return sorted(found, key=lambda graph: (-graph.size, graph.name))


def _walk(url: str) -> Iterator[tuple[str, int, float]]:
    """Path below the cache, bytes and time of writing of each file."""
    system, root = _open(url)
    try:
        if not system.isdir(root):
            raise UserError("there is no cache", place=url, fix="name one, or compile first")
        files = list(_files(system, root))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or one_line(error)}", place=error.filename or url) from None
    except Exception as error:  # a store has errors of its own, for want of credentials for instance
        raise UserError(one_line(error), place=url) from None
    for about in files:
        path = str(about["name"]).removeprefix(root).lstrip("/")
        yield path, int(about.get("size") or 0), _written(about)


def _files(system: Any, folder: str) -> Iterator[dict[str, Any]]:
    """fsspec's find, which on disk omits each folder that it cannot read; a store lists all of them in one answer."""
    if system.async_impl:
        yield from system.find(folder, detail=True).values()
        return
    for about in system.ls(folder, detail=True):
        if about["type"] != "directory":
            yield about
            continue
        with contextlib.suppress(FileNotFoundError):  # a compiler at work removes what it has done with
            yield from _files(system, about["name"])


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError:
        raise UserError("S3 needs another package", place=url, fix="pip install 'nxdt-nemo[s3]'") from None
    except ValueError as error:
        raise UserError(str(error), place=url) from None
    return system, str(root)


def _written(about: dict[str, Any]) -> float:
    when = next((about[key] for key in ("mtime", "LastModified", "created") if about.get(key) is not None), 0.0)
    return float(when.timestamp()) if hasattr(when, "timestamp") else float(when)


def counted(graphs: Iterable[Graph]) -> dict[State, int]:
    """How many are in each state; states without one are left out."""
    found: dict[State, int] = {}
    for graph in graphs:
        found[graph.state] = found.get(graph.state, 0) + 1
    return found
