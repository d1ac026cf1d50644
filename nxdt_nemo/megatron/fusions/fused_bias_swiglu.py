"""silu(gate) * up of y = [gate, up], and its gradient.

Room megatron/. Stands in for swiglu and swiglu_back of megatron.core.fusions.fused_bias_swiglu, on which its other
variants are built; enters by jit_fuser (nxdt_nemo/megatron/jit.py). Proof: tests/megatron/test_fusions.py.
Paper: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu", "swiglu_back"]


def swiglu(y: Tensor) -> Tensor:
    """[.., H] from y [.., 2H]."""
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_back(g: Tensor, y: Tensor) -> Tensor:
    """The gradient [.., 2H] for g [.., H]."""
    gate, up = y.chunk(2, -1)
    if torch.is_grad_enabled():  # a gradient of the gradient is wanted: nothing may be written in place
        return torch.cat((torch.ops.aten.silu_backward(g * up, gate), g * F.silu(gate)), -1)
    gradient = torch.empty_like(y)
    of_gate, of_up = gradient.chunk(2, -1)
    torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=of_gate)
    torch.mul(g, F.silu(gate), out=of_up)
    return gradient
