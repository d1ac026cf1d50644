"""What the fused optimizers share.

Room apex/. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["FusedOptimizer", "run_closure"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose group counts its steps and whose state holds tensors shaped like the parameter, nothing else.

    NeMo and megatron-core turn every entry of the state into a piece of a sharded checkpoint, so a scalar `step`
    there would fail; it lives in the group. Order within `step`: closure, then `update_group` for each group.
    """

    set_grad_none: bool = True

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients, or zero them; without an argument as `set_grad_none` said at construction."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but state keeps the dtype it was saved in: torch casts it to the parameter's.

        What torch's own optimizers saved is taken up too: their `step`, and groups that lack a setting of ours.
        """
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, param in reversed(list(zip(saved_ids, params, strict=True))):  # as FusedAdam.add_param_group
            for key, value in reversed(state_dict["state"].get(saved_id, {}).items()):
                if isinstance(value, torch.Tensor):
                    self.state[param][key] = value.to(param.device)
        own = {name: value for name, value in self.defaults.items() if name != "differentiable"}  # torch adds it here
        for group in self.param_groups:
            group.update({name: value for name, value in own.items() if name not in group})
            states = [self.state[param] for param in group["params"] if "step" in self.state.get(param, {})]
            if steps := [int(state.pop("step")) for state in states]:
                group["step"] = max(steps)

    def with_gradients(self, group: dict[str, Any]) -> list[torch.nn.Parameter]:
        """The group's parameters that have a gradient. Raises RuntimeError for what Apex refuses too."""
        found = [p for p in group["params"] if p.grad is not None]
        for param, grad in zip(found, self.gradients(found), strict=True):
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if param.dtype not in _DTYPES:
                raise RuntimeError(f"{type(self).__name__} supports float32, bfloat16 and float16, not {param.dtype}")
        return found

    @staticmethod
    def gradients(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Their gradients, in the same order."""
        return [p.grad for p in params if p.grad is not None]

    def moments(self, params: list[torch.nn.Parameter]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """exp_avg and exp_avg_sq of the parameters; new ones are zero, in float32."""
        for param in params:
            state = self.state[param]
            if not state:
                square = torch.zeros_like(param, dtype=torch.float32)  # first: see FusedAdam.add_param_group
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(square), square
        return [self.state[p]["exp_avg"] for p in params], [self.state[p]["exp_avg_sq"] for p in params]


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, computed with gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
