"""A plain LightningModule on one device of the lane.

Room lightning/. Beside lightning.pytorch.strategies.SingleDeviceXLAStrategy, which is for Lightning's XLAAccelerator.
Chosen by accelerator_connector.py. Proof: tests/lightning/test_single_device.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._pytree import tree_map_only

from nxdt_nemo.lightning.strategy import NeuronStrategyMixin
from nxdt_nemo.runtime import current

__all__ = ["NeuronSingleDeviceStrategy"]


class NeuronSingleDeviceStrategy(NeuronStrategyMixin, SingleDeviceStrategy):
    """What Trainer(accelerator="neuron", devices=1) trains by where the device is not the host.

    A traced lane has a graph for each step. Checkpoints are Lightning's files, with all tensors on the host.
    """

    distributed_sampler_kwargs = {"num_replicas": 1, "rank": 0}

    def _configure_launcher(self) -> None:
        """None: this process is the only rank."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """As Lightning, in a form that a machine without this device reads."""
        current().settle()
        on_host = tree_map_only(torch.Tensor, torch.Tensor.cpu, checkpoint)
        versions = getattr(checkpoint.get("state_dict"), "_metadata", None)
        if versions is not None:  # of the modules, which torch notes on the dict
            on_host["state_dict"]._metadata = versions
        super().save_checkpoint(on_host, filepath, storage_options)
