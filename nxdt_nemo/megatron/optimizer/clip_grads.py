"""Gradient clipping that does not ask for a CUDA tensor.

Room megatron/. Stands in for megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32.
Proof: tests/megatron/test_zero.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["clip_grad_by_total_norm_fp32"]


def clip_grad_by_total_norm_fp32(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scale the float32 gradients in place by max_norm / (total_norm + 1e-6) where that is less than one.

    use_decoupled_grad   gradients are in `decoupled_grad`
    """
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    params = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [grad for param in params if (grad := getattr(param, name, None)) is not None]
    scale = max_norm / (total_norm + 1.0e-6)
    if scale < 1.0 and grads:
        torch._foreach_mul_(grads, scale)
