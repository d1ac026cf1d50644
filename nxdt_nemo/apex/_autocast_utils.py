"""Casting to autocast's dtype by hand, around code that autocast does not know.

Room apex/. Stands in for apex._autocast_utils, on any device type. Proof: tests/apex/test_autocast.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["_cast_if_autocast_enabled", "without_autocast"]


def _device_type(args: tuple[Any, ...]) -> str | None:
    """The device type of the first tensor, if autocast may be on for it."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return None if arg.device.type == "meta" else arg.device.type
    return None


def _cast_if_autocast_enabled(*args: Any) -> tuple[Any, ...]:
    """The arguments; under autocast, floating tensors (not float64) in autocast's dtype."""
    device = _device_type(args)
    if device is None or not torch.is_autocast_enabled(device):
        return args
    dtype = torch.get_autocast_dtype(device)

    def cast(arg: Any) -> Any:
        wanted = isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype is not torch.float64
        return arg.to(dtype) if wanted else arg

    return tuple(cast(arg) for arg in args)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Autocast off for the tensor's device type: Apex's kernels never see autocast."""
    device = _device_type((tensor,))
    if device is None or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
