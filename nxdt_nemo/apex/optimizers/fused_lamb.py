"""LAMB.

Room apex/. Stands in for apex.optimizers.fused_lamb; `optim.name: lamb` in NeMo. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import amp_C
from ._base import FusedOptimizer, run_closure

__all__ = ["FusedLAMB"]


class FusedLAMB(FusedOptimizer):
    """Adam's update, each tensor's scaled by |p| / |update|, after clipping to a global gradient norm.

    The norms are this rank's: with tensor parallelism, those of its shards, as in Apex.
    State: exp_avg and exp_avg_sq, float32; the group's `step` counts. Raises RuntimeError for amsgrad.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLAMB does not support the AMSGrad variant")
        if max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={max_grad_norm} must be positive; float('inf') turns clipping off")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none, self.use_nvlamb = set_grad_none, use_nvlamb
        device = next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int, device=device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss = run_closure(closure)
        with torch.no_grad():
            everything = [g for group in self.param_groups for g in self.gradients(self.with_gradients(group))]
            if everything:
                norm, _ = amp_C.multi_tensor_l2norm(0, self._dummy_overflow_buf, [everything])
                for group in self.param_groups:
                    self._step_group(group, norm)
        return loss

    def _step_group(self, group: dict[str, Any], global_grad_norm: torch.Tensor) -> None:
        group["step"] = group.get("step", 0) + 1
        params = self.with_gradients(group)
        if not params:
            return
        beta1, beta2 = group["betas"]
        amp_C.multi_tensor_lamb(
            0,
            self._dummy_overflow_buf,
            [self.gradients(params), params, *self.moments(params)],
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["step"],
            int(group["bias_correction"]),
            group["weight_decay"],
            int(group["grad_averaging"]),
            self.adam_w_mode,
            global_grad_norm,
            self.defaults["max_grad_norm"],
            self.use_nvlamb,
        )
