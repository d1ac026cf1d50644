"""What is on this machine, told without importing it.

Room runtime/. Imports the standard library only. Proof: tests/runtime/test_select.py.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder, MetadataPathFinder
from pathlib import Path

__all__ = ["installed", "neuron_devices"]


def installed(module: str, distribution: str | None = None) -> str | None:
    """The version of a package on sys.path ("0" if it states none); None when it is not there.

    Asks the path and not sys.modules or sys.meta_path, so the answer is the same while keep_out hides it.
    """
    if PathFinder.find_spec(module) is None:
        return None
    context = DistributionFinder.Context(name=distribution or module)
    found = next(iter(MetadataPathFinder.find_distributions(context)), None)
    return found.version if found else "0"


def neuron_devices() -> int:
    """Neuron devices that the driver shows."""
    return len(list(Path("/dev").glob("neuron[0-9]*")))
