"""TorchNeuron on this machine, told without importing it.

Room runtime/. The package's name, torch_neuronx, is also that of the library on torch-xla before it (torch 2.9 and
older): what tells them apart is that the native one registers itself with torch. Imports the standard library and
packaging. Proof: tests/runtime/test_select.py.
"""

from __future__ import annotations

from importlib.metadata import DistributionFinder, MetadataPathFinder

from packaging.version import Version

from nxdt_nemo.runtime.machine import installed, neuron_devices

__all__ = ["AUTOLOAD", "obstacles", "registers_itself"]

GROUP = "torch.backends"  # entry points that `import torch` loads
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's switch for it: 0 turns it off."""
_OLDEST = (2, 10)


def registers_itself() -> bool:
    """Does the installed torch_neuronx come with an entry point for torch: is it TorchNeuron?"""
    found = next(iter(MetadataPathFinder.find_distributions(DistributionFinder.Context(name="torch_neuronx"))), None)
    return found is not None and any(point.group == GROUP for point in found.entry_points)


def obstacles(*, asked: bool = False) -> list[str]:
    """What keeps the lane from running here, the first reason first; nothing: it can.

    asked  the user named the lane: hints are added. A host whose device does not show in /dev is taken at the
           package's word then, which says so when the device is used.
    """
    torch, package = installed("torch"), installed("torch_neuronx", "torch_neuronx")
    native = package is not None and registers_itself()
    reasons = []
    if torch is None:
        reasons.append("torch is not installed")
    elif not native and Version(torch).release < _OLDEST:
        reasons.append(f"needs torch>={'.'.join(map(str, _OLDEST))}, found {Version(torch).public}")
    if package is None:
        hint = ": TorchNeuron comes with the AWS Neuron SDK, see docs/neuron.md" if asked else ""
        reasons.append(f"torch_neuronx is not installed{hint}")
    elif not native:
        reasons.append(f"torch_neuronx {Version(package).public} is the library on torch-xla, not TorchNeuron")
    elif torch is not None and _family(package) not in (_family(torch), (0, 1)):  # early builds said 0.1.0
        major, minor = _family(package)
        reasons.append(f"torch_neuronx {Version(package).public} is for torch {major}.{minor}, found {torch}")
    if not neuron_devices() and not (asked and native):
        reasons.append("no Neuron device")
    return reasons


def _family(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]
