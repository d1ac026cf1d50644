"""The neuron lane: TorchNeuron, a native device of torch >= 2.10. The interface only; a later issue fills it.

Room runtime/. Imports torch_neuronx when used, never before. Proof: tests/runtime/test_select.py,
test_unfilled.py.
"""

from __future__ import annotations

from packaging.version import Version

from nxdt_nemo.runtime.lane import Verdict
from nxdt_nemo.runtime.machine import installed, neuron_devices
from nxdt_nemo.runtime.unfilled import UnfilledLane, not_yet

__all__ = ["NeuronLane"]


class NeuronLane(UnfilledLane):
    """The native neuron device, one process a NeuronCore."""

    name = "neuron"
    backend = "neuron"

    @classmethod
    def probe(cls, *, asked: bool = False) -> Verdict:
        """The first obstacle for `auto`, all of them for someone who asked for this lane."""
        torch = installed("torch")
        obstacles = []
        if torch is None:
            obstacles.append("torch is not installed")
        elif Version(torch).release < (2, 10):
            obstacles.append(f"needs torch>=2.10, found {Version(torch).public}")
        if installed("torch_neuronx", "torch-neuronx") is None:
            hint = ": it comes with the AWS Neuron SDK" if asked else ""
            obstacles.append(f"torch_neuronx is not installed{hint}")
        if not neuron_devices():
            obstacles.append("no Neuron device")
        obstacles.append(not_yet(cls.name) if asked else "not in this release yet")
        return Verdict(False, "; ".join(obstacles) if asked else obstacles[0])
