"""A learning rate schedule that NxD Training's configurations name and NeMo does not have.

Room nemo/. Enters through nemo.core.optim.lr_scheduler.AVAILABLE_SCHEDULERS, NeMo's registry; no patch.
Proof: tests/nemo/test_optim.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from nxdt_nemo.patching.view import Views

__all__ = ["LinearAnnealingWithWarmUp", "register"]


class LinearAnnealingWithWarmUp(LambdaLR):
    """lr x step / warmup_steps up to warmup_steps, then in a straight line to 0 at max_steps. Steps count from 0.

    As transformers.get_linear_schedule_with_warmup: unlike NeMo's WarmupAnnealing the first step's rate is 0.
    """

    def __init__(self, optimizer: Any, warmup_steps: int = 0, max_steps: int = 0, last_epoch: int = -1) -> None:
        self.warmup_steps, self.max_steps = warmup_steps, max_steps
        super().__init__(optimizer, self._factor, last_epoch)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / max(1, self.warmup_steps)
        return max(0.0, (self.max_steps - step) / max(1, self.max_steps - self.warmup_steps))


def register(module: ModuleType, _: Views) -> Callable[[], None]:
    """Put it under its name; returns what takes it away."""
    module.AVAILABLE_SCHEDULERS["LinearAnnealingWithWarmUp"] = LinearAnnealingWithWarmUp
    return lambda: module.AVAILABLE_SCHEDULERS.pop("LinearAnnealingWithWarmUp", None) and None
