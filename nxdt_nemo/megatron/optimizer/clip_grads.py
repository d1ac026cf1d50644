"""Gradient clipping that does not ask for a CUDA tensor, and on a traced lane does not read the norm.

Room megatron/. Stands in for two functions of megatron.core.optimizer.clip_grads.
Proof: tests/megatron/test_zero.py, test_xla.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from nxdt_nemo.apex._kernels.lists import TRACED_DEVICES, store
from nxdt_nemo.apex._kernels.scale_norm import norms
from nxdt_nemo.runtime.select import current

__all__ = ["clip_grad_by_total_norm_fp32", "get_grad_norm_fp32"]


def get_grad_norm_fp32(
    grads_for_norm: list[Tensor] | Tensor,
    norm_type: float = 2,
    grad_stats_parallel_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Upstream's norm as a tensor [], float32: a value would cut a traced step in two graphs."""
    grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else list(grads_for_norm)
    if not grads:  # a rank whose part of the model is frozen takes part in the sum
        each = torch.zeros(1, device=current().device())
    else:
        each = norms(grads) if norm_type == 2 else _norms(grads, norm_type)
    if math.isinf(norm_type):
        total, op = each.amax(), dist.ReduceOp.MAX
    else:
        total, op = (each**norm_type).sum(), dist.ReduceOp.SUM
    dist.all_reduce(total, op=op, group=grad_stats_parallel_group)
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def _norms(grads: list[Tensor], norm_type: float) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(grad, norm_type, dtype=torch.float32) for grad in grads])


def clip_grad_by_total_norm_fp32(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    total_norm: float | Tensor,
    use_decoupled_grad: bool = False,
) -> None:
    """Scale the float32 gradients in place by max_norm / (total_norm + 1e-6) where that is less than one.

    use_decoupled_grad   gradients are in `decoupled_grad`
    """
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    params = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [grad for param in params if (grad := getattr(param, name, None)) is not None]
    scale = max_norm / (total_norm + 1.0e-6)
    if not grads:
        return
    if isinstance(scale, Tensor):
        factor = scale.clamp_max(1.0)
        if grads[0].device.type in TRACED_DEVICES:
            store([grad * factor for grad in grads], grads)
        else:
            torch._foreach_mul_(grads, factor)
    elif scale < 1.0:
        torch._foreach_mul_(grads, scale)
