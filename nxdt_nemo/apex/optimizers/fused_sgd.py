"""SGD with momentum.

Room apex/. Stands in for apex.optimizers.fused_sgd; `optimizer: sgd` in megatron-core.
Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._kernels.sgd import SgdSettings, sgd_update
from ._base import FusedOptimizer, run_closure

__all__ = ["FusedSGD"]


class FusedSGD(FusedOptimizer):
    """buf = momentum * buf + (1 - dampening) * g; p -= lr * buf (with nesterov, lr * (g + momentum * buf)).

    The weight decay is added to the gradient, or with wd_after_momentum to the step. State: momentum_buffer, in
    the parameter's dtype, only where momentum is not zero. materialize_master_grads is of apex.amp and ignored.
    Raises ValueError for values out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        for name, value in {"momentum": momentum, "weight_decay": weight_decay, "lr": lr}.items():
            if not isinstance(value, torch.Tensor) and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        self.wd_after_momentum, self.set_grad_none = wd_after_momentum, set_grad_none

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss = run_closure(closure)
        with torch.no_grad():
            for group in self.param_groups:
                params = self.with_gradients(group)
                started = [p for p in params if "momentum_buffer" in self.state[p]] if group["momentum"] else []
                fresh = [p for p in params if p not in set(started)]
                self._update(group, fresh, first_run=True)
                self._update(group, started, first_run=False)
        return loss

    def _update(self, group: dict[str, Any], params: list[torch.nn.Parameter], first_run: bool) -> None:
        if not params:
            return
        momenta: list[torch.Tensor] = []
        if group["momentum"]:
            momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        settings = SgdSettings(
            group["weight_decay"],
            group["momentum"],
            group["dampening"],
            group["lr"],
            group["nesterov"],
            first_run,
            self.wd_after_momentum,
        )
        sgd_update(self.gradients(params), params, momenta, settings)
