"""A training step leaves its numbers on the device: nothing is read back unless it is drawn or logged."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import pytest

from nxdt_nemo.lightning.progress import SECONDS, slow_down
from nxdt_nemo.testing.host_reads import HostReads
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV

STEPS = 6


class Bar:
    """What slow_down acts on."""

    def _should_update(self, current: int, total: int) -> bool:
        return current % 2 == 0 or current == total


def test_a_bar_is_drawn_when_it_is_due():
    now = [0.0]
    bar = Bar()
    slow_down(bar, clock=lambda: now[0])
    slow_down(bar, clock=lambda: now[0])  # a second fit of the same trainer
    drawn = []
    for step in range(1, 40):
        now[0] += SECONDS / 8
        if bar._should_update(step, 39):
            drawn.append(step)
    assert drawn == [2, 10, 18, 26, 34, 39], "each second step at most, SECONDS apart, and the last one"


def test_other_bars_are_left_alone():
    slow_down(None)
    slow_down(object())


# --- in a rank -------------------------------------------------------------------------------------------------------


def fit(folder: str, every: int, drawn: bool) -> dict[str, Any]:
    """Host reads by step of a Lightning run whose module logs two values to the bar; and what the bar was given."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy

    from nxdt_nemo.lightning import progress
    from nxdt_nemo.lightning.strategy import NeuronStrategyMixin

    class Strategy(NeuronStrategyMixin, DDPStrategy):
        pass

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any) -> Any:
            loss = self.layer(batch).square().mean()
            self.log("loss", loss, prog_bar=True)
            self.log("twice", loss * 2, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(STEPS * 2, 4), batch_size=2)

    class Count(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            reads.append(counted.count)

    reads: list[int] = []
    bar = pl.callbacks.TQDMProgressBar()
    seconds, progress.SECONDS = progress.SECONDS, 0.0 if drawn else 1e9
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            HostReads() as counted,
        ):
            trainer = pl.Trainer(
                accelerator="neuron",
                strategy=Strategy(),
                devices=1,
                max_epochs=1,
                log_every_n_steps=every,
                logger=CSVLogger(folder),
                callbacks=[bar, Count()],
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            trainer.fit(Line())
    finally:
        progress.SECONDS = seconds
    metrics = bar.get_metrics(trainer, trainer.lightning_module)
    steps = [after - before for before, after in itertools.pairwise(reads)]
    return {
        "steps": steps,
        "types": sorted({type(value).__name__ for name, value in metrics.items() if name in ("loss", "twice")}),
        "ratio": metrics["twice"] / metrics["loss"],
        "callback": sorted(type(value).__name__ for value in trainer.callback_metrics.values()),
    }


@pytest.mark.ranks
def test_an_undrawn_step_reads_nothing(active, tmp_path):
    quiet = active(fit, str(tmp_path), 1000, False)
    assert quiet["steps"][1:] == [0] * (STEPS - 2)
    assert quiet["types"] == ["float"], "who asks gets numbers"
    assert quiet["ratio"] == pytest.approx(2)
    assert quiet["callback"] == ["Tensor", "Tensor"]


@pytest.mark.ranks
def test_a_drawn_step_reads_what_it_draws(active, tmp_path):
    assert active(fit, str(tmp_path), 1000, True)["steps"][1:] == [2] * (STEPS - 2), "the count sees a read"


class Away:
    """A value of the device."""

    def cpu(self) -> float:
        return 1.5


class Checkpoints:
    """What compare_on_host acts on."""

    def _monitor_candidates(self, trainer: Any) -> dict[str, Any]:
        return {"val_loss": Away()}


def test_checkpoints_are_compared_on_the_host():
    from nxdt_nemo.lightning.logger_connector import compare_on_host

    callback = Checkpoints()
    compare_on_host([callback, object()])
    compare_on_host([callback])  # a second fit of the same trainer
    assert callback._monitor_candidates(None) == {"val_loss": 1.5}


def agrees(decisions: list[list[bool]]) -> list[Any]:
    """What this rank's strategy answers to each decision, by all and by any rank; and the reads."""
    import torch.distributed as dist
    from lightning.pytorch.strategies import DDPStrategy

    from nxdt_nemo.lightning.strategy import NeuronStrategyMixin

    class Strategy(NeuronStrategyMixin, DDPStrategy):
        pass

    strategy = Strategy()
    with HostReads() as counted:
        answers = [
            [strategy.reduce_boolean_decision(of_ranks[dist.get_rank()], all=every) for every in (True, False)]
            for of_ranks in decisions
        ]
    return [answers, counted.count]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
def test_a_decision_of_all_ranks_reads_nothing(gloo, world):
    decisions = [[False, True][:world], [True, True][:world], [False, False][:world]]
    expected = [[all(of_ranks), any(of_ranks)] for of_ranks in decisions]
    assert gloo(world, agrees, decisions, init=ACTIVE, env=ACTIVE_ENV) == [[expected, 0]] * world


# --- preemption ------------------------------------------------------------------------------------------------------


def asks(signals: list[bool]) -> list[Any]:
    """What this rank is told at the end of each step when rank 0 was signalled as in `signals`; and the reads."""
    import torch.distributed as dist
    from nemo.utils.callbacks.preemption import PreemptionCallback

    callback = PreemptionCallback(None)
    answers = []
    with HostReads() as counted:
        for signalled in signals:
            callback._interrupted = signalled if dist.get_rank() == 0 else False
            answers.append(callback.interrupted)
    return [answers, counted.count]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
def test_all_ranks_learn_of_a_preemption_in_the_same_step(gloo, world):
    pytest.importorskip("nemo.utils", reason="needs the extra: pip install nxdt-nemo[nemo]")
    signals = [False, False, True, True]
    found = gloo(world, asks, signals, init=ACTIVE, env=ACTIVE_ENV)
    assert found == [[signals, 0]] * world
