"""Logged values stay where they are until somebody looks at them, and then until they are there.

Room lightning/. Stands in for two members of lightning.pytorch.trainer.connectors.logger_connector:
result._ResultCollection.metrics, which turns every value meant for the progress bar into a Python number several
times a step, drawn or not, and logger_connector._LoggerConnector.progress_bar_metrics, where the bar asks for them;
and for lightning.pytorch.core.module.LightningModule.log, which sends numbers to the device. Acts on the
connector of one trainer, by instance, where it writes to loggers, and on its checkpoint callbacks, which compare
values. On a device that runs ahead of the host each reading would wait for the whole step.
Proof: tests/lightning/test_host_reads.py, tests/nemo/test_xla.py, tools/xla_run.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from numbers import Number
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning_utilities.core.apply_func import apply_to_collection

from nxdt_nemo.runtime import current

__all__ = ["compare_on_host", "log", "log_when_there", "metrics", "progress_bar_metrics"]

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
    """`trainer.progress_bar_metrics`: numbers.

    In a training step a number of the device is the one that was asked for last time, so that nobody waits; as it is
    now where one is new, and at all other times.
    """
    found = dict(original(self))
    shown: dict[str, Any] = self.__dict__.setdefault("_shown", {})
    away = {name: value for name, value in found.items() if getattr(value, "is_cpu", True) is False}
    if away and self.trainer.training and away.keys() <= shown.keys():
        current().defer(lambda *arrived: shown.update(_numbers(dict(zip(away, arrived, strict=True)))), *away.values())
    else:
        shown.update(_numbers(away))
    return {name: shown[name] if name in away else _numbers(value) for name, value in found.items()}


def _numbers(metrics: Any) -> Any:
    return convert_tensors_to_scalars(metrics)


def log_when_there(connector: Any) -> None:
    """Let a trainer's connector hand values to the loggers when the lane has them, under the step they are of.

    connector  lightning's _LoggerConnector, changed by instance
    """
    connector.log_metrics = functools.partial(_log_metrics, connector)


def _log_metrics(self: Any, metrics: dict[str, Any], step: int | None = None) -> None:
    """`_LoggerConnector.log_metrics`, deferred. `trainer.logged_metrics` is up to date at once, as tensors."""
    trainer = self.trainer
    if not trainer.loggers or not metrics:
        return
    self._logged_metrics.update(metrics)
    if not trainer.training:
        current().cut()  # a validation's mean is no part of what reads it, or of the next step
    epoch, batch = trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped

    def write(*values: torch.Tensor) -> None:
        arrived = iter(values)
        found = _numbers(apply_to_collection(metrics, torch.Tensor, lambda _: next(arrived)))
        place = found.pop("step", None) if step is None else step
        if place is None:
            found.setdefault("epoch", epoch)
            place = batch
        for logger in trainer.loggers:
            logger.log_metrics(metrics=found, step=place)
            logger.save()

    tensors: list[torch.Tensor] = []
    apply_to_collection(metrics, torch.Tensor, tensors.append)
    current().defer(write, *tensors)


def compare_on_host(callbacks: Iterable[Any]) -> None:
    """Let checkpoint callbacks compare values of the host: the best so far is one, a number, after a restart, and a
    tensor of the device from the first better one on. Each kind would have a graph of its own, whenever it comes.

    callbacks  lightning's ModelCheckpoint or subclasses, changed by instance
    """
    for callback in callbacks:
        if hasattr(callback, "_monitor_candidates"):
            callback._monitor_candidates = functools.partial(_candidates, callback)


def _candidates(self: Any, trainer: Any) -> dict[str, torch.Tensor]:
    """`ModelCheckpoint._monitor_candidates`, on the host."""
    found = type(self)._monitor_candidates(self, trainer)
    current().cut()  # one graph for the copies of all values
    return {name: value.cpu() for name, value in found.items()}


def log(original: Callable[..., None], self: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """`LightningModule.log`: a number of the host stays there, and so does all that Lightning does with it.

    On the device it would be a transfer, and its copies would be operations of whatever graph is traced next.
    """
    original(self, name, apply_to_collection(value, Number, _host_tensor), *args, **kwargs)


def _host_tensor(number: Any) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.get_default_dtype())
