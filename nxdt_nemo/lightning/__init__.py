"""Room lightning/: accelerator, strategies, the module that they train. Knows Lightning, not NeMo.

>>> from nxdt_nemo.lightning import MegatronLightningModule, NeuronMegatronStrategy

The names load when they are used: upstream's import hooks reach into this room while Lightning is half imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "MegatronLightningModule": "megatron_module",
    "NeuronAccelerator": "accelerators",
    "NeuronMegatronStrategy": "megatron_strategy",
}

__all__ = ["MegatronLightningModule", "NeuronAccelerator", "NeuronMegatronStrategy"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
