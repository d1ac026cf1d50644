"""A reading of the host's that hands over everything, not only what it needs.

Room runtime/. XLA computes what leads to the tensor that is read, in a graph of its own, and computes it again in the
next graph for whatever else depends on it: a validation that looks at each loss ran each forward pass three times.
Proof: tests/runtime/test_xla.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nxdt_nemo.runtime.xla.ops import cut

__all__ = ["Reading", "names_host"]

READS = frozenset(
    getattr(torch.Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu")
)


class Reading(TorchFunctionMode):
    """Within it, bool(), item(), cpu() and the like cut the graph first. Of this thread; torch_xla's tensors bear no
    dispatch mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in READS or (function is torch.Tensor.to and names_host(args[1:], kwargs)):
            cut_for(args[0])
        elif function is torch.tensor and isinstance(args[0], list | tuple):
            cut_for(*args[0])
        return function(*args, **kwargs)


def cut_for(*tensors: Any) -> None:
    if any(isinstance(tensor, torch.Tensor) and tensor.device.type == "xla" for tensor in tensors):
        cut()


def names_host(args: Any, kwargs: Any) -> bool:
    """Whether these arguments of Tensor.to ask for the host."""
    target = kwargs.get("device", args[0] if args else None)
    return isinstance(target, str | torch.device) and torch.device(target).type == "cpu"
