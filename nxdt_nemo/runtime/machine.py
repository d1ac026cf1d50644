"""What is on this machine, told without importing it.

Room runtime/. Imports the standard library only. Proof: tests/runtime/test_select.py.
"""

from __future__ import annotations

import os
import re
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path

__all__ = [
    "distribution",
    "host_memory",
    "installed",
    "neuron_devices",
    "process_memory",
    "product_name",
    "ranks_placed_here",
    "reset_process_peak",
    "text",
]


def installed(module: str, named: str | None = None) -> str | None:
    """The version of a package on sys.path ("0" if it states none); None when it is not there.

    Asks the path and not sys.modules or sys.meta_path, so the answer is the same while keep_out hides it.
    """
    if PathFinder.find_spec(module) is None:
        return None
    found = distribution(named or module)
    return found.version if found else "0"


def neuron_devices() -> int:
    """Neuron devices that the driver shows."""
    return len(list(Path("/dev").glob("neuron[0-9]*")))


def ranks_placed_here() -> int:
    """Ranks that a launcher started on this host; 0 where none says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0))


def distribution(name: str) -> Distribution | None:
    """The installed distribution of that name, from the path alone."""
    return next(iter(MetadataPathFinder.find_distributions(DistributionFinder.Context(name=name))), None)


def product_name() -> str:
    """What the host's firmware calls it, which on EC2 is the instance type; "" where there is none to ask."""
    return text("/sys/devices/virtual/dmi/id/product_name").strip()


def host_memory() -> int:
    """Bytes that this host, or the container, has."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = text("/sys/fs/cgroup/memory.max").strip()
    return min(host, int(limit)) if limit.isdigit() else host


def process_memory() -> tuple[int, int, int]:
    """Bytes of this process: private, resident, and the highest resident since the start or reset_process_peak."""
    status = dict(re.findall(r"^(\w+):\s*(\d+) kB$", text("/proc/self/status"), re.MULTILINE))
    private, resident, peak = (int(status.get(key, 0)) * 1024 for key in ("RssAnon", "VmRSS", "VmHWM"))
    return private, resident, max(peak, resident)


def reset_process_peak() -> None:
    """Start process_memory's peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def text(path: str) -> str:
    """A file of the kernel's, "" on a system that has none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
