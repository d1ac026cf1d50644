"""Gradients that add up in a tensor of each parameter's own, where steps are traced.

Room megatron/. Stands in for two classes of megatron.core.distributed.param_and_grad_buffer on traced lanes. Upstream's
main_grad is a view of one flat tensor: traced, each write to a view is a copy of the flat tensor (430 to 820 ms a step
against 122). Here a bucket is put together when it is reduced, and taken apart again; a group of one rank does neither.
Proof: tests/megatron/test_xla.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer as upstream
from torch import Tensor

__all__ = ["_ParamAndGradBucketGroup", "_ParamAndGradBuffer"]


class _ParamAndGradBuffer(upstream._ParamAndGradBuffer):
    """Upstream's plan of buckets; no flat tensor of gradients."""

    grad_data: Tensor

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        nothing: Tensor = torch.empty(0, dtype=self.grad_dtype, device=self.grad_data.device)
        self.grad_data = nothing
        for bucket in self.buckets:
            bucket.grad_data = nothing

    def _get(self, shape: torch.Size, start_index: int, buffer_type: Any) -> Tensor:
        if buffer_type is not upstream.BufferType.GRAD:
            return super()._get(shape, start_index, buffer_type)  # type: ignore[no-any-return]
        made = torch.zeros(shape, dtype=self.grad_dtype, device=self.grad_data.device)
        made.start = start_index  # type: ignore[attr-defined]
        return made

    def scale_gradients(self, scaling_factor: float) -> None:
        for param in self.params:
            param.main_grad.mul_(scaling_factor)

    def reset(self) -> None:
        for param in self.params:
            param.main_grad.zero_()


class _ParamAndGradBucketGroup(upstream._ParamAndGradBucketGroup):
    """Reduces what upstream reduces. Buckets are unsharded (zero.py refuses others here), and so without padding."""

    def start_grad_sync(self) -> None:
        asked = self.ddp_config
        checked = asked.check_for_nan_in_grad or asked.check_for_large_grads
        if self.data_parallel_group.size() == 1 and not (checked or asked.overlap_grad_reduce):
            for bucket in self.buckets:
                if bucket.gradient_scaling_factor != 1.0:
                    torch._foreach_mul_([p.main_grad for p in bucket.params_list], bucket.gradient_scaling_factor)
            self.grad_reduce_handle = None
            return
        for bucket in self.buckets:
            bucket.grad_data = torch.cat([param.main_grad.flatten() for param in _ordered(bucket)])
        super().start_grad_sync()
        for bucket in self.buckets:
            _take_apart(bucket)


def _ordered(bucket: Any) -> list[Any]:
    """Its parameters as the plan has them: upstream keeps them in a set, whose order is each rank's own."""
    return sorted(bucket.params_list, key=lambda param: param.main_grad.start)


def _take_apart(bucket: Any) -> None:
    grads = [param.main_grad for param in _ordered(bucket)]
    for grad, reduced in zip(grads, bucket.grad_data.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(reduced.view_as(grad))
    bucket.grad_data = bucket.grad_data.new_empty(0)
