"""`accelerator="gpu"` in a script means neuron while the backend is active; and a device gets a strategy that knows it.

Room lightning/. Wraps lightning.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector:
61 upstream recipes and scripts name "gpu", and the registry cannot rename an accelerator. Lightning's choice of a
strategy, changed by instance, is the host for any accelerator that it does not know.
Proof: tests/lightning/test_accelerators.py, tests/lightning/test_single_device.py, tests/nemo/test_nemo2.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nxdt_nemo import console
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.lightning.accelerators import NeuronAccelerator

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

__all__ = ["ALIASES", "init"]

ALIASES = ("gpu", "cuda", "auto", "tpu")


def init(original: Callable[..., None], self: Any, devices: Any = "auto", *args: Any, **kwargs: Any) -> None:
    """`_AcceleratorConnector.__init__` with CUDA's names read as neuron.

    Raises ConfigError for a strategy of Lightning's on a device that is not the host.
    """
    name = kwargs.get("accelerator", "auto")
    if name in ALIASES:
        kwargs["accelerator"] = "neuron"
        if name != "auto":
            console.once(f"accelerator={name!r} means neuron here", key="accelerator-alias")
        elif devices == "auto":
            # A plain Trainer() asks for whatever is there; on a laptop that is one rank, not one per core.
            devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    self._choose_strategy = functools.partial(_choose_strategy, self, self._choose_strategy)
    original(self, devices, *args, **kwargs)
    _refuse(self)
    if _has_devices(self):
        from nxdt_nemo.lightning.graphs import give_graphs

        give_graphs(self.strategy)


def _choose_strategy(self: Any, original: Callable[[], Strategy | str]) -> Strategy | str:
    """`_choose_strategy`, for "auto": one device that is not the host gets a strategy that trains on it."""
    if not _has_devices(self) or len(self._parallel_devices) > 1 or self._num_nodes_flag > 1:
        return original()
    from nxdt_nemo.lightning.single_device import NeuronSingleDeviceStrategy

    return NeuronSingleDeviceStrategy(self._parallel_devices[0])


def _refuse(self: Any) -> None:
    """Lightning's own strategies train on CUDA's devices and the host: DDP makes a stream of CUDA's, for one."""
    kind = type(self.strategy)
    if _has_devices(self) and kind.__module__.startswith("lightning."):
        device = self._parallel_devices[0].type
        raise ConfigError(
            f"Lightning's {kind.__name__} does not train on {device} devices",
            place="trainer.strategy",
            fix="use NeuronMegatronStrategy for several, and leave the strategy out for one",
        )


def _has_devices(self: Any) -> bool:
    """Are this connector's devices the lane's, and not the host?"""
    return isinstance(self.accelerator, NeuronAccelerator) and self._parallel_devices[0].type != "cpu"
