"""Gradients that add up in a tensor of each parameter's own, where steps are traced.

Room megatron/. Stands in for two classes of megatron.core.distributed.param_and_grad_buffer on traced lanes. Upstream's
main_grad is a view of one flat tensor: traced, each write to a view is a copy of the flat tensor (430 to 820 ms a step
against 122). Here a bucket is put together when it is reduced, and taken apart again; a group of one rank does neither.
With a distributed optimizer that optimizer does both (optimizer/traced_zero.py), and parameters stay as they are too.
Proof: tests/megatron/test_xla.py, test_xla_zero.py, tests/nemo/test_nemo2.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer as upstream
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as _UpstreamGroup
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from torch import Tensor

from nxdt_nemo.runtime.select import current

__all__ = ["_ParamAndGradBucketGroup", "_ParamAndGradBuffer"]


class _ParamAndGradBuffer(upstream._ParamAndGradBuffer):
    """Upstream's plan of buckets, without padding; no flat tensor of gradients, nor of parameters."""

    grad_data: Tensor

    def __init__(self, ddp_config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(replace(ddp_config, use_distributed_optimizer=False), *arguments, **named)
        self.ddp_config = ddp_config
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


class _ParamAndGradBucketGroup(_UpstreamGroup):
    """Reduces what upstream reduces; with a distributed optimizer nothing, and gathers nothing, which that does."""

    def start_grad_sync(self) -> None:
        asked = self.ddp_config
        sharded = asked.use_distributed_optimizer
        if not sharded and (self.data_parallel_group.size() > 1 or asked.overlap_grad_reduce):
            self._put_together()
            super().start_grad_sync()
            for bucket in self.buckets:
                _take_apart(bucket)
            return
        if asked.check_for_nan_in_grad or asked.check_for_large_grads:
            self.check_grads(asked.check_for_nan_in_grad, asked.check_for_large_grads)
        if not sharded:
            for bucket in self.buckets:
                if bucket.gradient_scaling_factor != 1.0:
                    torch._foreach_mul_([p.main_grad for p in bucket.params_list], bucket.gradient_scaling_factor)
            self.grad_reduce_handle = None

    def check_grads(self, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        """Answered after the step, which stays one graph: its RuntimeError comes a step later, before NeMo saves; a
        loop of one's own calls `settle` of the lane before it does. At once where the step may run again for the answer
        (rerun_state_machine) or norms are compared."""
        if check_for_large or get_rerun_state_machine().mode != RerunMode.DISABLED:
            before = [bucket.grad_data for bucket in self.buckets]
            self._put_together()
            super().check_grads(check_for_nan_or_inf, check_for_large)
            for bucket, data in zip(self.buckets, before, strict=True):
                bucket.grad_data = data
            return
        grads = [[param.main_grad for param in bucket.params_list] for bucket in self.buckets]
        current().defer(_check_norms, *(torch.stack(torch._foreach_norm(of_one)).norm() for of_one in grads))

    def finish_grad_sync(self) -> None:
        if not self.ddp_config.use_distributed_optimizer:
            super().finish_grad_sync()
        elif not self.ddp_config.overlap_grad_reduce:  # else begun when the last gradient was there
            self.start_grad_sync()

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Nothing: parameters are whole when the optimizer's step returns."""

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        """Nothing, as start_param_sync."""

    def _put_together(self) -> None:
        for bucket in self.buckets:
            bucket.grad_data = torch.cat([param.main_grad.flatten() for param in _ordered(bucket)])


def _check_norms(*norms: Tensor) -> None:
    """Upstream's check of buckets with these norms, which are theirs."""
    stand_in = SimpleNamespace(buckets=[SimpleNamespace(grad_data=norm) for norm in norms])
    _UpstreamGroup.check_grads(stand_in, check_for_nan_or_inf=True, check_for_large=False)


def _ordered(bucket: Any) -> list[Any]:
    """Its parameters as the plan has them: upstream keeps them in a set, whose order is each rank's own."""
    return sorted(bucket.params_list, key=lambda param: param.main_grad.start)


def _take_apart(bucket: Any) -> None:
    grads = [param.main_grad for param in _ordered(bucket)]
    for grad, reduced in zip(grads, bucket.grad_data.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(reduced.view_as(grad))
    bucket.grad_data = bucket.grad_data.new_empty(0)
