"""The machine: Python, cores, memory, limits.

Room audit/. Uses runtime/. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import cache_from_source
from pathlib import Path

from nxdt_nemo.audit.doctor.row import Row
from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.machine import neuron_devices

__all__ = ["rows"]

SECTION = "machine"
GIB = 2**30
OPEN_FILES = 4096
SHARED_MEMORY, FREE_DISK = 1 * GIB, 10 * GIB
# Large packages that every run imports.
COMPILED = ("torch", "nemo", "megatron", "transformers", "lightning")


def rows() -> Iterator[Row]:
    """The rows of this section."""
    python = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        yield Row(SECTION, "python", python)
    else:
        yield Row(SECTION, "python", python, "problem", "use Python 3.11, which NeMo 2.4's pins are for")
    yield Row(SECTION, "platform", platform.platform())
    yield Row(SECTION, "cores", str(len(os.sched_getaffinity(0))))
    yield Row(SECTION, "memory", _gib(CpuLane().total_memory()))
    devices = neuron_devices()
    yield Row(SECTION, "Neuron devices", f"{devices} (/dev/neuron*)" if devices else "none")
    yield _space("/dev/shm", "/dev/shm", SHARED_MEMORY, "data workers share memory there; docker: --shm-size=8g")
    yield _space("disk, this folder", ".", FREE_DISK, "checkpoints of a real model take more")
    yield _open_files()
    yield _bytecode()


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _space(what: str, place: str, enough: int, fix: str) -> Row:
    try:
        usage = shutil.disk_usage(place)
    except OSError as error:
        return Row(SECTION, what, error.strerror or str(error), "note", fix)
    found = f"{_gib(usage.free)} free of {_gib(usage.total)}"
    return Row(SECTION, what, found) if usage.free >= enough else Row(SECTION, what, found, "note", fix)


def _open_files() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Row(SECTION, "open files", f"limit {'none' if soft == resource.RLIM_INFINITY else soft}")
    fix = f"ulimit -n {OPEN_FILES}: checkpoints and data files of many shards need more"
    return Row(SECTION, "open files", f"limit {soft} (hard {hard})", "note", fix)


def _bytecode() -> Row:
    """Without .pyc files every process compiles what it imports: 27 CPU seconds instead of 10 for NeMo."""
    sources = [file for name in COMPILED if (file := _some_module(name)) is not None]
    missing = [file for file in sources if not Path(cache_from_source(str(file))).is_file()]
    if not missing:
        return Row(SECTION, "bytecode", "compiled" if sources else "nothing to compile")
    found = f"not compiled: {', '.join(file.parent.name for file in missing)}"
    kept = ", and PYTHONDONTWRITEBYTECODE keeps it so" if os.environ.get("PYTHONDONTWRITEBYTECODE") else ""
    return Row(SECTION, "bytecode", found + kept, "note", f"python -m compileall -q {missing[0].parent.parent}")


def _some_module(package: str) -> Path | None:
    """The first module of an installed package, itself or below, that is Python source."""
    spec = PathFinder.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return None
    for location in spec.submodule_search_locations:
        found = [Path(location, "__init__.py"), *sorted(Path(location).glob("*/__init__.py"))]
        for file in found:
            if file.is_file():
                return file
    return None
