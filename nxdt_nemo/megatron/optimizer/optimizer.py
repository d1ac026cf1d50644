"""megatron-core's bf16 optimizer with float32 main parameters, without CUDA's type names.

Room megatron/. Stands in for the constructor of megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params;
everything else of that class is upstream's. Proof: tests/megatron/test_zero.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes

__all__ = ["init_float16_optimizer"]


def init_float16_optimizer(self: Any, optimizer: Any, config: Any, grad_scaler: Any, init_state_fn: Any) -> None:
    """Put a float32 copy in the place of each half precision parameter; float32 ones stay as they are.

    Raises TypeError naming the dtype of a parameter that is neither.
    """
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
            copy_tensor_model_parallel_attributes(main, param)
            if hasattr(param, "shared"):
                main.shared = param.shared
            param.main_param = group["params"][place] = main
            if param in optimizer.state:
                optimizer.state[main] = optimizer.state.pop(param)
            halves.append(param)
            mains.append(main)
        self.float16_groups.append(halves)
        self.fp32_from_float16_groups.append(mains)
        self.fp32_from_fp32_groups.append(fulls)
