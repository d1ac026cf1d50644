"""`LightningModule.cuda` and `.to("cuda")` for modules in scope.

Room lightning/. Changes lightning.fabric.utilities.device_dtype_mixin's class when it is imported, which is while
Lightning itself is half imported: imports no Lightning. Proof: tests/lightning/test_accelerators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType

from nxdt_nemo.patching.view import Views
from nxdt_nemo.runtime.torch_view import hook_cuda, hook_to

__all__ = ["hook_modules"]


def hook_modules(module: ModuleType, views: Views) -> Callable[[], None]:
    """They call torch's own from Lightning's module, `cuda` after it asked CUDA; returns what takes the change back."""
    undo = ExitStack()
    for hook in (hook_cuda, hook_to):
        undo.callback(hook(module._DeviceDtypeModuleMixin, views))
    return undo.close
