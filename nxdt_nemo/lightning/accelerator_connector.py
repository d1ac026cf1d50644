"""`accelerator="gpu"` in a script means neuron while the backend is active.

Room lightning/. Wraps lightning.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector:
61 upstream recipes and scripts name "gpu", and the registry cannot rename an accelerator.
Proof: tests/lightning/test_accelerators.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from nxdt_nemo import console

__all__ = ["ALIASES", "init"]

ALIASES = ("gpu", "cuda", "auto", "tpu")


def init(original: Callable[..., None], self: Any, devices: Any = "auto", *args: Any, **kwargs: Any) -> None:
    """`_AcceleratorConnector.__init__` with CUDA's names read as neuron."""
    name = kwargs.get("accelerator", "auto")
    if name in ALIASES:
        kwargs["accelerator"] = "neuron"
        if name != "auto":
            console.once(f"accelerator={name!r} means neuron here", key="accelerator-alias")
        elif devices == "auto":
            # A plain Trainer() asks for whatever is there; on a laptop that is one rank, not one per core.
            devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    original(self, devices, *args, **kwargs)
