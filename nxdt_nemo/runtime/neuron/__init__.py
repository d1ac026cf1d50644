"""The neuron lane: TorchNeuron's native device of torch, one process a NeuronCore.

Room runtime/. Importing it imports neither torch nor torch_neuronx. docs/neuron.md has the picture.
"""

from nxdt_nemo.runtime.neuron.lane import NeuronLane

__all__ = ["NeuronLane"]
