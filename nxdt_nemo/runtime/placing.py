"""Moving a module to a device that is none of torch's own, with what upstream noted on its parameters.

Room runtime/. Stands in for torch.nn.Module.to where a parameter's data cannot change its kind of device in place (XLA,
PrivateUse1): torch makes new parameters there, without Megatron's `tensor_model_parallel` and the like, and unties tied
ones. Imports torch. Proof: tests/runtime/test_xla.py, test_neuron.py.
"""

from __future__ import annotations

import torch

__all__ = ["place"]


def place(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`module` on the device; parameters that two modules share have to be placed in one call."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is None or old.device == device:
                continue
            if old not in made:
                made[old] = torch.nn.Parameter(old.detach().to(device), old.requires_grad)
                made[old].__dict__.update(vars(old))
            part._parameters[name] = made[old]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module.to(device)  # for what subclasses note there: Lightning's modules their device
