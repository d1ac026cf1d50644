"""The xla lane: a training step traced by torch-xla 2.9 into one graph, for Neuron SDKs up to 2.29.

Room runtime/. Importing it imports neither torch nor torch_xla. docs/xla.md has the picture.
"""

from nxdt_nemo.runtime.xla.lane import XlaLane

__all__ = ["XlaLane"]
