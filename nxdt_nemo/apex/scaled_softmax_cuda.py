"""The extension module scaled_softmax_cuda: softmax with scale.

Room apex/. Called by megatron.core.fusions.fused_softmax. Proof: tests/apex/test_softmax.py.
"""

from __future__ import annotations

import torch

from ._kernels.softmax import backward, scaled_masked_softmax

__all__ = ["backward", "forward"]


def forward(inputs: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """softmax(inputs * scale) over the last dimension."""
    return scaled_masked_softmax(inputs, None, scale)
