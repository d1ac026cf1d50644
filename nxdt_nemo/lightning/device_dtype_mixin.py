"""`LightningModule.cuda` and `.to("cuda")` for modules in scope, and `.cpu` when a Trainer is done.

Room lightning/. Changes lightning.fabric.utilities.device_dtype_mixin's class when it is imported, which is while
Lightning itself is half imported: imports no Lightning. Proof: tests/lightning/test_accelerators.py,
tests/lightning/test_after_fit.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from nxdt_nemo.patching.view import Views
from nxdt_nemo.runtime.torch_view import hook_cuda, hook_to

__all__ = ["hook_modules"]

STRATEGY = "lightning.pytorch.strategies.strategy"


def hook_modules(module: ModuleType, views: Views) -> Callable[[], None]:
    """They call torch's own from Lightning's module, `cuda` after it asked CUDA; returns what takes the change back."""
    undo = ExitStack()
    for hook in (hook_cuda, hook_to):
        undo.callback(hook(module._DeviceDtypeModuleMixin, views))
    undo.callback(_stay_when_torn_down(module._DeviceDtypeModuleMixin))
    return undo.close


def _stay_when_torn_down(owner: Any) -> Callable[[], None]:
    """Let a module stay on its device when Strategy.teardown calls `cpu`; returns what takes it back.

    On a GPU its parameters are the same ones on the host. Where their data cannot change its kind of device (XLA,
    PrivateUse1) torch makes new ones, which the optimizer does not know, without Megatron's marks and ties: nothing
    could be saved after that.
    """
    original = owner.cpu

    @functools.wraps(original)
    def cpu(self: Any) -> Any:
        return self if sys._getframe(1).f_globals.get("__name__") == STRATEGY else original(self)

    owner.cpu = cpu
    return lambda: setattr(owner, "cpu", original)
