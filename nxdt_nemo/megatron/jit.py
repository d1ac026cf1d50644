"""What upstream's `@jit_fuser` gives on this backend: kernels written by hand for the functions that cost time.

Room megatron/. Stands in for megatron.core.jit.jit_fuser, which is torch.compile: 15 s at the first step, again for
each new shape, and bound to its device. Enters by the registration of megatron.core.jit, no patch. A kernel serves
the source that it was written for; if upstream's has changed the import stops.
Proof: tests/megatron/test_jit.py, tests/megatron/test_fusions.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.fingerprint import source_of
from nxdt_nemo.patching.view import Views, load_object
from nxdt_nemo.runtime.select import current

__all__ = ["KERNELS", "Kernel", "jit_fuser", "register"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """Ours, "package.module:name", and the fingerprints of upstream's functions in whose place it computes."""

    replacement: str
    sources: dict[str, str]


_OURS = "nxdt_nemo.megatron.fusions."
KERNELS = {
    "megatron.core.fusions.fused_bias_gelu.bias_gelu": Kernel(
        _OURS + "fused_bias_gelu:bias_gelu",
        {"bias_gelu": "sha256:11c2736a603c75168b605a92d10661f77768c993c362191b19a4aa1bd6de41d3"},
    ),
    "megatron.core.fusions.fused_bias_gelu.bias_gelu_back": Kernel(
        _OURS + "fused_bias_gelu:bias_gelu_back",
        {"bias_gelu_back": "sha256:a5e2553ff8a1319b309cdabfc40849503924b7483eb66a4a37464797b3c1abe5"},
    ),
    "megatron.core.fusions.fused_bias_swiglu.swiglu": Kernel(
        _OURS + "fused_bias_swiglu:swiglu",
        {"swiglu": "sha256:0ff31b5c8d3af90ce4e48d885e71699b9da74ac07dc1319478d820de2b165deb"},
    ),
    "megatron.core.fusions.fused_bias_swiglu.swiglu_back": Kernel(
        _OURS + "fused_bias_swiglu:swiglu_back",
        {"swiglu_back": "sha256:e120d5a742343cae7777cdab8d17f86291a8dc137fac87dea0465c6a52a103da"},
    ),
    "megatron.core.fusions.fused_bias_dropout.bias_dropout_add_fused_train": Kernel(
        _OURS + "fused_bias_dropout:bias_dropout_add_fused_train",
        {
            "bias_dropout_add_fused_train": "sha256:27338d86eff9c0d254914516c616fdc58829e581a9cb79872957c090adebac17",
            "_bias_dropout_add_func": "sha256:7e941db6c0b36b230d2977fca6f3112f77997bc33d7ea3288e0fa05b53c7039e",
        },
    ),
}


_replaced: dict[str, Function] = {}  # upstream's own, by the names in KERNELS


def jit_fuser(function: Function) -> Function:
    """Our kernel for this function of upstream's, or the function itself; compiled where the lane has a compiler."""
    target = f"{function.__module__}.{function.__qualname__}"
    kernel = KERNELS.get(target)
    if kernel is None:
        return current().compiled(function)
    source = source_of(sys.modules[function.__module__])
    for name, expected in kernel.sources.items():
        if (found := source.fingerprint([name])) != expected:
            raise PatchError(
                f"{function.__module__}.{name} is not the one that {kernel.replacement} was written for: "
                f"{found}, expected {expected}"
            )
    _replaced[target] = function
    return _ours(target)


def register(module: ModuleType, _: Views) -> Callable[[], None]:
    """Put jit_fuser into megatron.core.jit, before any fusion is imported; returns what puts upstream's back.

    Fusions that an earlier activation imported get their kernels again.
    """
    before = module.jit_fuser
    module.jit_fuser = jit_fuser  # type: ignore[attr-defined]
    for name in _replaced:
        _bind(name, _ours(name))

    def undo() -> None:
        module.jit_fuser = before  # type: ignore[attr-defined]
        for name, function in _replaced.items():
            _bind(name, function)

    return undo


def _ours(target: str) -> Function:
    return current().compiled(load_object(KERNELS[target].replacement))


def _bind(name: str, function: Function) -> None:
    module, _, attribute = name.rpartition(".")
    if module in sys.modules:
        setattr(sys.modules[module], attribute, function)
