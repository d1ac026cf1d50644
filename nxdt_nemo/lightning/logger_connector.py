"""Logged values stay tensors until somebody looks at them.

Room lightning/. Stands in for two members of lightning.pytorch.trainer.connectors.logger_connector:
result._ResultCollection.metrics, which turns every value meant for the progress bar into a Python number several
times a step, drawn or not, and logger_connector._LoggerConnector.progress_bar_metrics, where the bar asks for them.
On a device that runs ahead of the host each such reading waits for the whole step.
Proof: tests/lightning/test_host_reads.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars

__all__ = ["metrics", "progress_bar_metrics"]

Metrics = dict[str, dict[str, Any]]


def metrics(self: Any, on_step: bool) -> Metrics:
    """What was logged in this batch or epoch, for callbacks, loggers and the bar: all of it as tensors.

    on_step   True for the values of a batch, False for an epoch's
    """
    found: Metrics = {"callback": {}, "log": {}, "pbar": {}}
    for _, logged in self.valid_items():
        value = self._get_cache(logged, on_step)
        if not isinstance(value, torch.Tensor):
            continue
        name, forked = self._forked_name(logged, on_step)
        meta = logged.meta
        if meta.logger:
            found["log"][forked] = value
        if self.training or (meta.on_epoch and not on_step):
            found["callback"].update({name: value, forked: value})
        if meta.prog_bar:
            found["pbar"][forked] = value
    return found


def progress_bar_metrics(original: Callable[[Any], dict[str, Any]], self: Any) -> dict[str, Any]:
    """`trainer.progress_bar_metrics`: numbers, read now."""
    numbers: dict[str, Any] = convert_tensors_to_scalars(original(self))
    return numbers
