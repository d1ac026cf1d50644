"""The stand-in's `torch_neuronx`: importing it registers the device `neuron` and the process groups of that name.

Copied as it is into the folder that neuron_standin.installed() makes; importable there only, beside its compiled _C.
Has the names of TorchNeuron that the lane uses, and its limits (see process_group.py).
"""

import sys

import torch
from torch.utils import backend_registration
from torch_neuronx import _C, neuron, process_group


def _autoload() -> None:
    """torch's entry point: being imported is all."""


def _register() -> None:
    backend_registration.rename_privateuse1_backend("neuron")
    torch._register_device_module("neuron", neuron)
    backend_registration.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    torch.distributed.Backend.register_backend("neuron", process_group.NeuronProcessGroup, devices=["neuron"])
    sys.modules["torch.neuron"] = neuron


_register()

# TorchNeuron has these here, not in torch.neuron.
memory_allocated = memory_reserved = _C.memory_allocated
max_memory_allocated = max_memory_reserved = _C.max_memory_allocated
reset_peak_memory_stats = _C.reset_peak_memory_stats
