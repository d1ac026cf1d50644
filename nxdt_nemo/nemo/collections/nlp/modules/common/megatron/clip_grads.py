"""One gradient norm for all expert-parallel ranks, and one program for all tensor-parallel ones.

Room nemo/. Wraps nemo.collections.nlp.modules.common.megatron.clip_grads.clip_grad_norm_fp32, which sums squares over
tensor- and pipeline-parallel ranks only: with expert parallelism each rank clips by a norm of its own experts, and what
they hold alike drifts apart. What tensor-parallel ranks hold alike it counts on the first, so that the others trace
another graph. Proof: tests/nemo/test_optim.py, tests/nemo/test_xla.py, tests/cli/test_audit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from nxdt_nemo.megatron.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from nxdt_nemo.megatron.optimizer.norms import gradient_norm
from nxdt_nemo.runtime.select import current

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

    Upstream's own on eager lanes without expert parallelism, and for another norm than the 2-norm. Raises
    NotImplementedError for that with expert parallelism.
    """
    experts = parallel_state.get_expert_model_parallel_world_size() > 1
    known = norm_type == 2 and not use_fsdp
    if experts and not known:
        raise NotImplementedError(f"norm_type={norm_type}, use_fsdp={use_fsdp} with expert parallelism")
    if not known or not (experts or current().traced):
        return upstream(parameters, max_norm, norm_type, use_fsdp)
    params: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = gradient_norm(params)
    clip_grad_by_total_norm_fp32(params, max_norm, norm)
    return norm
