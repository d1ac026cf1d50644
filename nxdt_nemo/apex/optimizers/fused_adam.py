"""Adam and AdamW.

Room apex/. Stands in for apex.optimizers.fused_adam; `optim.name: fused_adam` in NeMo, `optimizer: adam` in
megatron-core. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import amp_C
from .._absent import refuse
from .._kernels.adam import AdamSettings, adam_update
from .._kernels.lists import TRACED_DEVICES
from ._base import FusedOptimizer, run_closure

__all__ = ["FusedAdam"]


class FusedAdam(FusedOptimizer):
    """p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), or with adam_w_mode=False the decay in the gradient.

    lr may be a float or a one-element tensor. State: exp_avg and exp_avg_sq, float32, shaped like the parameter;
    the group's `step` counts. capturable=True keeps lr and step in tensors and skips a step on overflow without a
    branch, when a grad scaler is passed to `step`.
    Raises RuntimeError for amsgrad and NotOnNeuron for master_weights.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant")
        if master_weights:
            refuse(
                "FusedAdam(master_weights=True)", "precision bf16 with model.megatron_amp_O2=True keeps float32 copies"
            )
        defaults = {
            "lr": torch.as_tensor(lr, dtype=torch.float32) if capturable else lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none, self.capturable, self.master_weights = set_grad_none, capturable, master_weights
        device = next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int, device=device)
        if capturable:
            self._step_supports_amp_scaling = True
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. On a device the moments are made here: they are no part of a step's graph.

        XLA writes a result over an input of its size, if they come at the same place: results in the order in which
        their tensors were made, inputs as the graph comes by them, from the last layer's on. Hence the order here.
        """
        super().add_param_group(param_group)
        added = [p for p in reversed(self.param_groups[-1]["params"]) if p.requires_grad and p.device.type != "cpu"]
        for param in added:
            if param.device.type in TRACED_DEVICES and isinstance(param, torch.nn.Parameter):
                param.data = param.data.clone()
        self.moments(added)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: None = None,
        output_params: None = None,
        scale: None = None,
        grad_norms: None = None,
        grad_scaler: Any = None,
    ) -> Any:
        """One step; returns the closure's loss. The four arguments after it are of an older Apex and must be None."""
        if any(old is not None for old in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam.step takes no gradients, outputs, scale or norms")
        loss = run_closure(closure)
        with torch.no_grad():
            for group in self.param_groups:
                if group["params"]:
                    self._step_group_capturable(group, grad_scaler) if self.capturable else self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1
        params = self.with_gradients(group)
        beta1, beta2 = group["betas"]
        settings = AdamSettings(
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["step"],
            self.adam_w_mode == 1,
            bool(group["bias_correction"]),
            group["weight_decay"],
        )
        means, squares = self.moments(params)
        adam_update(self.gradients(params), params, means, squares, settings)

    def _step_group_capturable(self, group: dict[str, Any], grad_scaler: Any) -> None:
        device = group["params"][0].device
        inv_scale = torch.ones(1, device=device)
        self._dummy_overflow_buf.zero_()
        if grad_scaler is not None:
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            inv_scale = grad_scaler._get_scale_async().double().reciprocal().float()
        counted = (self._dummy_overflow_buf != 1).to(torch.int)
        group["step"] = group["step"] + counted if "step" in group else counted
        params = self.with_gradients(group)
        if not params:
            return
        beta1, beta2 = group["betas"]
        amp_C.multi_tensor_adam_capturable(
            0,
            self._dummy_overflow_buf,
            [self.gradients(params), params, *self.moments(params)],
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["step"],
            self.adam_w_mode,
            int(group["bias_correction"]),
            group["weight_decay"],
            inv_scale,
        )
