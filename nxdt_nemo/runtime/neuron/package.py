"""TorchNeuron on this machine, told without importing it.

Room runtime/. The package's name, torch_neuronx, is also that of the library on torch-xla before it (torch 2.9 and
older): what tells them apart is that the native one registers itself with torch. Imports the standard library and
packaging. Proof: tests/runtime/test_select.py.
"""

from __future__ import annotations

from packaging.version import Version

from nxdt_nemo.runtime.machine import distribution, installed, neuron_devices

__all__ = ["AUTOLOAD", "obstacles", "registers_itself", "version"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's switch: with 0 `import torch` loads no library of a device."""
_GROUP = "torch.backends"  # the entry points that it loads otherwise
_OLDEST = (2, 10)
_EARLY = (0, 1)  # what builds of the closed beta called themselves, whatever their torch


def version() -> str | None:
    """The installed torch_neuronx's."""
    return installed("torch_neuronx")


def registers_itself() -> bool:
    """Does the installed torch_neuronx come with an entry point for torch: is it TorchNeuron?"""
    found = distribution("torch_neuronx")
    return found is not None and any(point.group == _GROUP for point in found.entry_points)


def obstacles(*, asked: bool = False) -> list[str]:
    """What keeps the lane from running here, the first reason first; nothing: it can.

    asked  the user named the lane: hints are added, and a host that shows no device in /dev may have one all the same;
           where it has none the lane says so when the device is asked for.
    """
    torch, package = installed("torch"), version()
    native = package is not None and registers_itself()
    found = []
    if torch is None:
        found.append("torch is not installed")
    elif not native and Version(torch).release < _OLDEST:
        found.append(f"needs torch>={'.'.join(map(str, _OLDEST))}, found {Version(torch).public}")
    if package is None:
        hint = ": TorchNeuron comes with the AWS Neuron SDK, see docs/neuron.md" if asked else ""
        found.append(f"torch_neuronx is not installed{hint}")
    elif not native:
        found.append(f"torch_neuronx {Version(package).public} is the library on torch-xla, not TorchNeuron")
    elif torch is not None and _family(package) not in (_family(torch), _EARLY):
        major, minor = _family(package)
        found.append(f"torch_neuronx {Version(package).public} is for torch {major}.{minor}, found {torch}")
    if not neuron_devices() and not (asked and native):
        found.append("no Neuron device")
    return found


def _family(number: str) -> tuple[int, ...]:
    return Version(number).release[:2]
