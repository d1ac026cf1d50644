"""`module.cuda()` on a LightningModule.

Room lightning/. Its `cuda` is Lightning's own (lightning.fabric.utilities.device_dtype_mixin), which asks
torch.cuda for a device. Proof: tests/lightning/test_accelerators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from nxdt_nemo.patching.view import Views
from nxdt_nemo.runtime.torch_view import hook_cuda

__all__ = ["hook"]


def hook(module: ModuleType, views: Views) -> Callable[[], None]:
    """As nn.Module.cuda: the runtime's device, when a module in scope says it; returns what takes it back."""
    return hook_cuda(module._DeviceDtypeModuleMixin, views)
