"""Norms of all parameters and of all gradients, each element counted once, as tensors on the device.

Room megatron/. Beside megatron.core.optimizer.clip_grads.get_grad_norm_fp32, which reads the norm back to the host at
once. Copies are told by upstream's marks: embeddings that another stage has too (`shared`), what tensor-parallel ranks
hold alike, and copies of KV heads (tensor_parallel/layers.py). Proof: tests/megatron/test_norms.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from nxdt_nemo.apex._kernels.scale_norm import norms
from nxdt_nemo.runtime.select import current

__all__ = ["counted", "gradient_norm", "parameter_norm", "sharded_gradient_norm", "square_sum"]


def counted(params: Iterable[Any]) -> list[Any]:
    """Those that count on this rank: neither another stage's embedding nor another tensor-parallel rank's copy."""
    return [param for param in params if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)]


def parameter_norm(params: Iterable[Any]) -> Tensor:
    """The 2-norm of a model's parameters, float32, shape []. All ranks call it with all of theirs."""
    return _norm(counted(params), lambda param: param.detach())


def gradient_norm(params: Iterable[Any]) -> Tensor:
    """The 2-norm of gradients that data-parallel ranks hold alike, in `grad`; float32, shape []."""
    return _norm(counted(params), lambda param: param.grad)


@torch.no_grad()
def sharded_gradient_norm(optimizer: Any) -> Tensor:
    """The 2-norm of the gradients of megatron-core's sharded optimizer, float32, shape []; after their reduction."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    total = square_sum([grad for one in parts for grad in one.counted_gradients()])
    dist.all_reduce(total, group=parts[0].get_grad_stats_parallel_group())
    return total.sqrt()


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements, float32, shape []."""
    return norms(tensors).square().sum() if tensors else torch.zeros((), device=current().device())


@torch.no_grad()
def _norm(params: Sequence[Any], part: Callable[[Any], Tensor | None]) -> Tensor:
    """Experts are divided among other ranks than the rest with expert parallelism: a sum over groups for each."""
    totals = []
    for experts, group in (
        (False, parallel_state.get_model_parallel_group()),
        (True, parallel_state.get_expert_tensor_model_pipeline_parallel_group()),
    ):
        if experts and parallel_state.get_expert_model_parallel_world_size() == 1:
            continue
        found = (part(param) for param in params if experts is not getattr(param, "allreduce", True))
        total = square_sum([tensor for tensor in found if tensor is not None])
        dist.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum().sqrt()
