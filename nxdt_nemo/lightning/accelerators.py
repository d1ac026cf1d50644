"""`accelerator="neuron"` for Lightning.

Room lightning/. Stands in for lightning.pytorch.accelerators.cuda; enters by Lightning's
AcceleratorRegistry, no patch. Proof: tests/lightning/test_accelerators.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.accelerators.accelerator import Accelerator

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.patching.view import Views
from nxdt_nemo.runtime import current

__all__ = ["NeuronAccelerator", "register"]


class NeuronAccelerator(Accelerator):
    """The devices of the runtime's lane, as Lightning asks for them."""

    def setup(self, trainer: Any) -> None:
        """Bind the precision plugin's autocast to the runtime's device, whatever strategy runs.

        MegatronTrainerBuilder and Lightning write "cuda" into it, and torch turns such an autocast off.
        Lightning evaluates without inference mode on its own XLA accelerator: so does this one where a lane has none.
        Raises ConfigError for training in fp16.
        """
        plugin = trainer.precision_plugin
        if str(getattr(plugin, "precision", "")).startswith("16") and trainer.training:
            raise ConfigError("fp16 does not train on this backend", place="trainer.precision", fix="use bf16-mixed")
        if getattr(plugin, "device", None) == "cuda":
            plugin.device = current().device().type
        if not current().has_inference_mode:
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False

    def setup_device(self, device: torch.device) -> None:
        """Nothing: a lane's device is set up when its ranks come up."""

    def get_device_stats(self, device: str | torch.device) -> dict[str, Any]:
        """Bytes allocated, reserved and at peak on this rank's device."""
        figures = current().memory()
        return {"allocated_bytes": figures.allocated, "reserved_bytes": figures.reserved, "peak_bytes": figures.peak}

    def teardown(self) -> None:
        """Nothing to give back."""

    @staticmethod
    def parse_devices(devices: Any) -> int | list[int]:
        """Trainer(devices=...): a number, -1 or "auto" (all), "2", "0,1" or a list of indices.

        Raises ConfigError naming trainer.devices.
        """
        if isinstance(devices, Sequence) and not isinstance(devices, str):  # a list, or omegaconf's
            indices = list(devices)
            if not indices or len(set(indices)) < len(indices) or any(type(i) is not int or i < 0 for i in indices):
                raise ConfigError(f"{indices} names no devices", place="trainer.devices", fix="give indices: [0,1]")
            return indices
        text = str(devices).strip()
        if text in ("-1", "auto"):
            return current().device_count()
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts or not all(part.isdigit() for part in parts):
            raise ConfigError(f"{devices!r} names no devices", place="trainer.devices", fix="give a number, as in 2")
        if "," in text:
            return NeuronAccelerator.parse_devices([int(part) for part in parts])
        return int(text)

    @staticmethod
    def get_parallel_devices(devices: int | list[int]) -> list[torch.device]:
        """One device for each rank of this host."""
        indices = list(range(devices)) if isinstance(devices, int) else devices
        return [current().device(index) for index in indices]

    @staticmethod
    def auto_device_count() -> int:
        """What devices="auto" stands for."""
        return current().device_count()

    @staticmethod
    def is_available() -> bool:
        """Always: the cpu lane is on every machine."""
        return True

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Put "neuron" into Lightning's registry."""
        accelerator_registry.register("neuron", cls, description="AWS Trainium, or its rehearsal on the cpu lane")


def register(module: ModuleType, _: Views) -> Callable[[], None]:
    """Add `neuron` to the registry of lightning.pytorch.accelerators; returns what takes it out again."""
    registry = module.AcceleratorRegistry
    NeuronAccelerator.register_accelerators(registry)
    return lambda: registry.remove("neuron")
