"""Where a traced lane's graphs begin and end in Lightning's loops.

Room lightning/. A mixin that stands before a strategy's class. Our own strategies have it from strategy.py; others,
nemo.lightning.MegatronStrategy among them, get it from their Trainer (accelerator_connector.py).
Proof: tests/lightning/test_host_reads.py, tests/nemo/test_nemo2.py, tests/nemo/test_host_reads.py.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy

from nxdt_nemo.lightning import pipeline_loss
from nxdt_nemo.lightning.logger_connector import compare_on_host, log_when_there
from nxdt_nemo.lightning.progress import slow_down
from nxdt_nemo.runtime import current
from nxdt_nemo.runtime.hosts import host_world

__all__ = ["GraphsMixin", "give_graphs"]

if TYPE_CHECKING:

    class _Base(Strategy): ...
else:  # Strategy's own base: without it an instance of a strategy could not become one of these
    _Base = ABC


class GraphsMixin(_Base):
    """Lightning's hooks of a strategy, each as it was, with what a lane that traces steps needs beside it.

    A boundary hands over every tensor that is alive and not computed yet. All steps are one graph if each leaves the
    same ones: nothing of a validation, and no garbage.
    """

    _between = False
    _hosts: dist.ProcessGroup | None = None

    def _get_process_group_backend(self) -> str:
        """The lane's: the collectives of another are no part of a graph."""
        lane = current()
        lane.register_backend()
        return lane.backend

    def on_train_start(self) -> None:
        """As Lightning; what set-up left is no part of the first step, and nobody reads what is not looked at."""
        super().on_train_start()
        trainer = self.lightning_module.trainer
        slow_down(trainer.progress_bar_callback)
        log_when_there(trainer._logger_connector)
        compare_on_host(trainer.checkpoint_callbacks)
        if current().traced:
            gc.collect()
            gc.freeze()  # what is there now is left out when garbage is sought
        current().cut()

    def on_train_end(self) -> None:
        """What the last steps deferred is answered before callbacks go on."""
        current().settle()
        super().on_train_end()

    def on_exception(self, exception: BaseException) -> None:
        """As Lightning; and what was deferred in whole steps is answered, if the device and whoever asked still can."""
        super().on_exception(exception)
        with contextlib.suppress(Exception):  # any other error would keep Lightning from its teardown
            current().salvage()

    def teardown(self) -> None:
        gc.unfreeze()
        self._hosts = None
        super().teardown()

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """As Lightning's, from host to host: on the device each of the two answers would be a graph of its own, and
        compiled when it comes for the first time.

        decision  this rank's
        all       whether every rank has to say so; else one is enough
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return decision
        self._hosts = self._hosts or host_world()  # a collective call, as is this
        agreed = torch.tensor(decision, dtype=torch.uint8)
        dist.all_reduce(agreed, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX, group=self._hosts)
        return bool(agreed.numpy())

    def on_validation_start(self) -> None:
        super().on_validation_start()
        current().cut()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning: one graph, or as many as it reads values."""
        return _own_graph(super().validation_step, *args, **kwargs)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._between = True

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As validation_step."""
        return _own_graph(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As validation_step."""
        return _own_graph(super().predict_step, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning; and ranks of a pipeline's stage have one graph where NeMo sends the loss from one to one."""
        step = super().training_step
        return pipeline_loss.training_step(step, self, *args, **kwargs) if current().traced else step(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning; and the step's graph ends here."""
        with current().step_goes_on():
            result = super().optimizer_step(*args, **kwargs)
        if current().traced:
            gc.collect()  # frames that a caught exception keeps hold the loss: omegaconf raises one in most steps
        current().step_boundary()
        return result

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning; what a validation left is no part of the step."""
        if self._between:  # Lightning resets what a validation has logged after on_validation_end
            current().cut()
            self._between = False
        super().on_train_batch_start(*args, **kwargs)


class _OthersMixin(GraphsMixin):
    """For a strategy whose checkpoints are its own."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """As that strategy; nothing is computed twice for what it reads."""
        current().settle()
        with current().reading():
            super().save_checkpoint(checkpoint, filepath, storage_options)


def give_graphs(strategy: Any) -> None:
    """Let a Trainer's strategy that knows no lanes end its graphs, where there are any: changed by instance."""
    kind = type(strategy)
    if current().traced and not isinstance(strategy, GraphsMixin):
        strategy.__class__ = type(kind.__name__, (_OthersMixin, kind), {"__module__": kind.__module__})


def _own_graph(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with current().reading():
        result = step(*args, **kwargs)
    current().cut()
    return result
