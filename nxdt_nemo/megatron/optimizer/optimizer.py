"""megatron-core's bf16 optimizer with float32 main parameters, without CUDA's type names; and chains of optimizers.

Room megatron/. Stands in for the constructor of megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params;
everything else of that class is upstream's. ChainedOptimizer is a subclass of upstream's, put in its place because
get_megatron_optimizer constructs it by name. Proof: tests/megatron/test_zero.py, tests/megatron/test_core_examples.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer as _ChainedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer

from nxdt_nemo.errors import UserError
from nxdt_nemo.megatron.optimizer.distrib_optimizer import DistributedOptimizer
from nxdt_nemo.megatron.optimizer.norms import copy_marks
from nxdt_nemo.megatron.optimizer.sharded_state import groups_of, states_of
from nxdt_nemo.runtime.rounding import SWITCH
from nxdt_nemo.runtime.select import current

__all__ = ["ChainedOptimizer", "init_float16_optimizer"]


def init_float16_optimizer(self: Any, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Any) -> None:
    """Put a float32 copy in the place of each half precision parameter; float32 ones stay as they are.

    Raises TypeError naming the dtype of a parameter that is neither, and UserError where stochastic rounding is asked
    for on a lane without it: this optimizer is for loops of one's own, and NeMo's are rounded in all of theirs.
    """
    if current().emulates_rounding:
        reason = f"{SWITCH}=1 is not emulated in megatron-core's unsharded optimizer"
        raise UserError(reason, fix="use use_distributed_optimizer=True, or unset it")
    MixedPrecisionOptimizer.__init__(self, optimizer, config, grad_scaler, init_state_fn)
    self.is_stub_optimizer = not optimizer
    if not optimizer:
        return
    self.float16_groups, self.fp32_from_float16_groups, self.fp32_from_fp32_groups = [], [], []
    for group in optimizer.param_groups:
        halves, mains, fulls = [], [], []
        for place, param in enumerate(group["params"]):
            if not param.requires_grad:
                continue
            if param.dtype == torch.float32:
                fulls.append(param)
                continue
            if param.dtype not in (torch.bfloat16, torch.float16):
                raise TypeError(f"parameters are float32, bfloat16 or float16, not {param.dtype}")
            main = param.detach().clone().float()
            copy_marks(main, param)
            param.main_param = group["params"][place] = main
            if param in optimizer.state:
                optimizer.state[main] = optimizer.state.pop(param)
            halves.append(param)
            mains.append(main)
        self.float16_groups.append(halves)
        self.fp32_from_float16_groups.append(mains)
        self.fp32_from_fp32_groups.append(fulls)


class ChainedOptimizer(_ChainedOptimizer):
    """What get_megatron_optimizer gives: one optimizer, with expert parallelism two. Signature: upstream's."""

    def step(self) -> tuple[bool, Any, Any]:
        """As upstream; and a loop that knows no lanes has done a training step."""
        result: tuple[bool, Any, Any] = super().step()
        current().optimizer_stepped()
        return result

    @torch.no_grad()
    def get_grad_norm(self) -> Any:
        """As upstream, which asks the host for each of two optimizers' norms: tensors stay where they are."""
        if len(self.chained_optimizers) == 1 or self.grads_states_parallel_group_is_shared():
            return super().get_grad_norm()
        norms = [one.get_grad_norm() for one in self.chained_optimizers]
        squares: Any = sum(norm**2 for norm in norms if norm is not None)  # one without parameters has none
        return squares.sqrt() if isinstance(squares, torch.Tensor) else math.sqrt(squares)

    def load_state_dict(self, state_dict: Any) -> None:
        """As upstream; and what one optimizer has saved into several, or several into one, where they are sharded ones.

        Each takes the hyper-parameters of the saved group of its kind, see DistributedOptimizer.load_state_dict.
        Raises UserError for optimizers that are not sharded.
        """
        several = len(self.chained_optimizers) > 1
        numbers = [key for key in state_dict if isinstance(key, int)] if isinstance(state_dict, dict) else []
        others = {key: value for key, value in state_dict.items() if key not in numbers} if numbers else {}
        saved_by_one, saved_by_several = bool(others), any(groups_of(state_dict[number]) for number in numbers)
        if (several and not saved_by_one) or (not several and not saved_by_several):
            super().load_state_dict(state_dict)
            return
        if not all(isinstance(one, DistributedOptimizer) for one in self.chained_optimizers):
            text = "the checkpoint was saved with another expert_model_parallel_size, and the optimizer is not sharded"
            raise UserError(text, fix="use optim.name=mcore_distributed_optim, or the size that it was saved with")
        parts = [state_dict[number] for number in sorted(numbers)]
        groups = groups_of(others) if several else [group for part in parts for group in groups_of(part)]
        for one, part in zip(self.chained_optimizers, parts if several else [others], strict=True):
            one.load_state_dict({"state": states_of(part), "param_groups": groups})
