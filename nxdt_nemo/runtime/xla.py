"""The xla lane: torch-xla 2.9 (Neuron SDK up to 2.29). The interface only; a later issue fills it.

Room runtime/. Imports torch_xla when used, never before. Proof: tests/runtime/test_select.py, test_unfilled.py.
"""

from __future__ import annotations

from nxdt_nemo.runtime.lane import Verdict
from nxdt_nemo.runtime.machine import installed, neuron_devices
from nxdt_nemo.runtime.unfilled import UnfilledLane, not_yet

__all__ = ["XlaLane"]


class XlaLane(UnfilledLane):
    """Graphs traced by torch-xla, one process a NeuronCore."""

    name = "xla"
    backend = "xla"

    @classmethod
    def probe(cls, *, asked: bool = False) -> Verdict:
        """Without a Neuron device it rehearses on XLA:CPU, which `auto` does not choose."""
        if installed("torch_xla") is None:
            hint = ": pip install 'nxdt-nemo[xla]'" if asked else ""
            return Verdict(False, f"torch_xla is not installed{hint}")
        if not asked and not neuron_devices():
            return Verdict(False, "no Neuron device")
        return Verdict(False, not_yet(cls.name) if asked else "not in this release yet")
