"""GELU (tanh form) of y + bias, and its gradient, in torch's own one-pass kernels.

Room megatron/. Stands in for bias_gelu and bias_gelu_back of megatron.core.fusions.fused_bias_gelu; enters by
jit_fuser (nxdt_nemo/megatron/jit.py). Proof: tests/megatron/test_fusions.py.
Paper: Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bias_gelu", "bias_gelu_back"]


def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
    """gelu(y + bias): y [.., H], bias [H]."""
    return F.gelu(y + bias, approximate="tanh")


def bias_gelu_back(g: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """g * gelu'(y + bias), shaped as y; the bias's gradient is its sum over rows, which autograd takes."""
    gradient: Tensor = torch.ops.aten.gelu_backward(g, y + bias, approximate="tanh")
    return gradient
