"""bf16 parameters trained through fp32 main parameters and fp32 gradients (megatron_amp_O2).

Room nemo/. Stands in for nemo.core.optim.optimizer_with_main_params.MainParamsOptimizerWrapper: same
attributes and state_dict. Upstream tells parameters apart by CUDA type strings and reduces gradients in an
asynchronous PREMUL_SUM that nothing waits for. Here a gradient is accumulated into its own fp32 main_grad
(no flat buffer: XLA would carry it through every step) and reduced once a step. Proof: tests/nemo/test_optim.py.
Paper: Micikevicius et al. 2017, arXiv:1710.03740, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nxdt_nemo.megatron.optimizer.norms import copy_marks
from nxdt_nemo.runtime.rounding import copy_rounded_
from nxdt_nemo.runtime.select import current

__all__ = ["MainParamsOptimizerWrapper", "add_to_main_grad"]

HALF = (torch.bfloat16, torch.float16)


class MainParamsOptimizerWrapper(torch.optim.Optimizer):
    """Steps `optimizer` on fp32 copies of half precision parameters and copies the result back.

    optimizer                     built on the model's parameters; its groups are rewritten to the copies
    fp32_grad_accum               must be True: gradients add up in main_grad, float32, in the parameter's shape
    async_grad_allreduce          True: gradients are reduced when they are first asked for after backward;
                                  False: when the model calls allreduce_main_grads
    grad_div_ar_fusion            one pre-multiplied sum or a division and a sum: equal here, both in fp32
    grad_allreduce_chunk_size_mb  bytes of one all-reduce; 0 for 125 MB
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        fp32_grad_accum: bool = False,
        contiguous_grad_bucket: bool = False,
        async_grad_allreduce: bool = False,
        grad_div_ar_fusion: bool = True,
        grad_allreduce_chunk_size_mb: int = 0,
    ) -> None:
        if not fp32_grad_accum:
            raise ValueError("MainParamsOptimizerWrapper accumulates in fp32 only: train with bf16")
        self.optimizer = optimizer
        self._chunk = (grad_allreduce_chunk_size_mb or 125) * 2**20
        self._async = async_grad_allreduce and parallel_state.get_data_parallel_world_size(True) > 1
        self._sync_wanted, self._reduced = True, False
        # Per group: model parameters in half precision, their fp32 copies, parameters that are fp32 already.
        self.float16_groups: list[list[nn.Parameter]] = []
        self.fp32_from_float16_groups: list[list[Tensor]] = []
        self.fp32_from_fp32_groups: list[list[nn.Parameter]] = []
        self._expert: list[bool] = []
        for group in optimizer.param_groups:
            self._adopt(group)
        # Casts what state the optimizer has to its new parameters.
        optimizer.load_state_dict(optimizer.state_dict())

    def _adopt(self, group: dict[str, Any]) -> None:
        halves, mains, fulls = [], [], []
        for index, param in enumerate(group["params"]):
            if not param.requires_grad:
                continue
            if param.dtype not in HALF:
                fulls.append(param)
                continue
            main = _main_param(param)
            param.main_grad = main.grad
            param.register_post_accumulate_grad_hook(add_to_main_grad)
            group["params"][index] = main
            if param in self.optimizer.state:
                self.optimizer.state[main] = self.optimizer.state.pop(param)
            halves.append(param)
            mains.append(main)
        self.float16_groups.append(halves)
        self.fp32_from_float16_groups.append(mains)
        self.fp32_from_fp32_groups.append(fulls)
        self._expert.append(bool(group.get("is_expert", False)))

    # --- gradients -----------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients; main gradients stay allocated, since the model holds them as main_grad."""
        self._reduced = False
        for halves, mains, fulls in zip(
            self.float16_groups, self.fp32_from_float16_groups, self.fp32_from_fp32_groups, strict=True
        ):
            for param in (*halves, *fulls):
                param.grad = None
            if grads := [grad for main in mains if (grad := main.grad) is not None]:
                torch._foreach_zero_(grads)

    def copy_model_grads_to_main_grads(self) -> None:
        """Move gradients that did not come by way of backward into the main gradients."""
        for param in (param for halves in self.float16_groups for param in halves):
            add_to_main_grad(param)

    def allreduce_main_grads(self) -> None:
        """Average the gradients over the data-parallel ranks (context-parallel ones summed), in fp32."""
        self._reduced = True
        scale = 1.0 / parallel_state.get_data_parallel_world_size()
        for expert, mains, fulls in zip(
            self._expert, self.fp32_from_float16_groups, self.fp32_from_fp32_groups, strict=True
        ):
            group = (
                parallel_state.get_expert_data_parallel_group()
                if expert
                else parallel_state.get_data_parallel_group(with_context_parallel=True)
            )
            grads = [grad for param in (*mains, *fulls) if (grad := param.grad) is not None]
            if grads and scale != 1.0:  # an expert without copies has seen all ranks' tokens: their sum, not the mean
                torch._foreach_mul_(grads, scale)
            if grads and group.size() > 1:
                _reduce(grads, group, self._chunk)

    def _finish_reduction(self) -> None:
        if self._async and self._sync_wanted and not self._reduced:
            self.allreduce_main_grads()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, gradients stay this rank's own."""
        wanted, self._sync_wanted = self._sync_wanted, False
        try:
            yield
        finally:
            self._sync_wanted = wanted

    @property
    def async_master_grads_allreudce(self) -> bool:
        """Upstream's spelling. False: the model must not expect a reduction within backward."""
        return False

    @property
    def fp32_grad_accumulation(self) -> bool:
        """True: see fp32_grad_accum."""
        return True

    def get_parameters_with_grad(self) -> list[Tensor]:
        """Main parameters that have a gradient, reduced: what gradient clipping works on."""
        self._finish_reduction()
        params: list[Tensor] = [param for group in self.optimizer.param_groups for param in group["params"]]
        return [param for param in params if param.grad is not None]

    # --- step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None, **kwargs: Any) -> bool:  # type: ignore[override]
        """Step the main parameters and copy them into the model's."""
        if closure is not None:
            raise ValueError("the precision plugin runs the closure; step() takes none")
        self._finish_reduction()
        self.optimizer.step(**kwargs)
        if current().emulates_rounding:
            self._round()
        else:
            self._copy(self.fp32_from_float16_groups, self.float16_groups)
        return True

    def _round(self) -> None:
        """Copy, rounded by the number of steps made, which the inner optimizer keeps in its groups or its states."""
        counts = [group["step"] for group in self.optimizer.param_groups if "step" in group]
        counts = counts or [state["step"] for state in self.optimizer.state.values() if "step" in state]
        step = max(map(int, counts), default=0)
        for mains, halves in zip(self.fp32_from_float16_groups, self.float16_groups, strict=True):
            for main, half in zip(mains, halves, strict=True):
                copy_rounded_(half.detach(), main, step)

    @torch.no_grad()
    def reload_model_params(self) -> None:
        """Take the main parameters from the model's again, after weights were loaded into it."""
        self._copy(self.float16_groups, self.fp32_from_float16_groups)

    @staticmethod
    def _copy(source: list[list[Any]], target: list[list[Any]]) -> None:
        for froms, tos in zip(source, target, strict=True):
            if froms:
                torch._foreach_copy_(tos, froms)

    # --- state: upstream's keys ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """`optimizer` and, by group, `fp32_from_fp16_params`."""
        return {"optimizer": self.optimizer.state_dict(), "fp32_from_fp16_params": self.fp32_from_float16_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what state_dict gave. Raises KeyError if either part is missing: nothing is half loaded."""
        inner, mains = state_dict["optimizer"], state_dict["fp32_from_fp16_params"]
        self.optimizer.load_state_dict({"state": {}, **inner})
        with torch.no_grad():
            for current, saved in zip(self.fp32_from_float16_groups, mains, strict=True):
                for param, value in zip(current, saved, strict=True):
                    param.copy_(value)

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's, holding main parameters; schedulers write the learning rate here."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value


def _main_param(param: nn.Parameter) -> Tensor:
    main = param.detach().clone().float()
    copy_marks(main, param)
    main.grad = torch.zeros_like(main)
    return main


def add_to_main_grad(param: Tensor) -> None:
    """After backward: add a half precision gradient to its float32 sum, and drop it.

    Nothing where the optimizer of an earlier fit, whose hook is on the parameter as well, has done it.
    """
    if param.grad is not None:
        param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
        param.grad = None


def _reduce(grads: list[Tensor], group: Any, chunk: int) -> None:
    """All-reduce in place, `chunk` bytes at a time: few collectives, bounded extra memory."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
        if size >= chunk:
            _reduce_bucket(bucket, group)
            bucket, size = [], 0
    if bucket:
        _reduce_bucket(bucket, group)


def _reduce_bucket(bucket: list[Tensor], group: Any) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        torch.distributed.all_reduce(bucket[0], group=group)
        return
    flat = torch._utils._flatten_dense_tensors(bucket)
    torch.distributed.all_reduce(flat, group=group)
    torch._foreach_copy_(bucket, torch._utils._unflatten_dense_tensors(flat, bucket))
