"""One gradient norm for all expert-parallel ranks.

Room nemo/. Wraps nemo.collections.nlp.modules.common.megatron.clip_grads.clip_grad_norm_fp32, which sums squares over
tensor- and pipeline-parallel ranks only: with expert parallelism each rank clips by a norm of its own experts, and what
they hold alike drifts apart. Proof: tests/nemo/test_optim.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nxdt_nemo.megatron.optimizer.norms import gradient_norm

__all__ = ["clip_grad_norm_fp32"]


@torch.no_grad()
def clip_grad_norm_fp32(
    upstream: Callable[..., Tensor],
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2,
    use_fsdp: bool = False,
) -> Tensor:
    """Scale float32 gradients in place by max_norm / (norm + 1e-6) where that is less than one; returns the norm.

    Upstream's own without expert parallelism. Raises NotImplementedError for another norm than the 2-norm with it.
    """
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return upstream(parameters, max_norm, norm_type, use_fsdp)
    if norm_type != 2 or use_fsdp:
        raise NotImplementedError(f"norm_type={norm_type}, use_fsdp={use_fsdp} with expert parallelism")
    params: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = gradient_norm(params)
    if grads := [param.grad for param in params if param.grad is not None]:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
