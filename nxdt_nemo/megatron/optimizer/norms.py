"""Norms of all parameters and of all gradients, each element counted once, as tensors on the device.

Room megatron/. Beside megatron.core.optimizer.clip_grads.get_grad_norm_fp32, which reads the norm back to the host at
once. Copies are told by upstream's marks: embeddings that another stage has too (`shared`), what tensor-parallel ranks
hold alike, and copies of KV heads (tensor_parallel/layers.py). Proof: tests/megatron/test_norms.py, test_xla_zero.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_tensor_model_parallel_attributes,
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from nxdt_nemo.apex._kernels.scale_norm import norms
from nxdt_nemo.runtime.select import current

__all__ = [
    "copy_marks",
    "counted",
    "gradient_norm",
    "grads_for_norm",
    "parameter_norm",
    "scaled",
    "sharded_gradient_norm",
    "share",
    "square_sum",
]


def share(param: Any) -> float:
    """What an element counts on this rank, so that it counts once on all ranks together.

    0 where another stage has the embedding. Of t tensor-parallel ranks that hold it alike the first counts it; where
    graphs are traced each counts 1 / t of it, and each of c copies of a KV head 1 / c: ranks that left out what others
    count would have other graphs.
    """
    if not param_is_not_shared(param):
        return 0.0
    if not current().traced:
        return float(param_is_not_tensor_parallel_duplicate(param))
    if hasattr(param, "kv_heads"):
        return 1.0 / float(param.kv_heads.copies)
    if getattr(param, "tensor_model_parallel", False):
        return 1.0
    if getattr(param, "allreduce", True):
        return 1.0 / float(parallel_state.get_tensor_model_parallel_world_size())
    return 1.0 / float(parallel_state.get_expert_tensor_parallel_world_size())


def copy_marks(main: Tensor, param: Tensor) -> None:
    """Give a main parameter what `share` and the reductions read of the model's."""
    copy_tensor_model_parallel_attributes(main, param)
    for name in ("shared", "allreduce", "sequence_parallel", "kv_heads"):
        if hasattr(param, name):
            setattr(main, name, getattr(param, name))


def counted(params: Iterable[Any]) -> list[Any]:
    """Those that count on this rank, in full or in part."""
    return [param for param in params if share(param)]


def grads_for_norm(self: Any) -> list[Tensor]:
    """Stands in for upstream's MegatronOptimizer.get_main_grads_for_grad_norm: scaled, so that squares add up once."""
    params = [param for param in self.get_parameters() if param.grad is not None]
    return [scaled(param.grad, share(param)) for param in counted(params)]


def scaled(grad: Tensor, part: float) -> Tensor:
    """A gradient whose squares count `part` of themselves."""
    return grad if part == 1.0 else grad * math.sqrt(part)


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
        found = ((part(param), share(param)) for param in params if experts is not getattr(param, "allreduce", True))
        total = square_sum([scaled(tensor, counts) for tensor, counts in found if tensor is not None])
        dist.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum().sqrt()
