"""Lightning's counters after a restart, on its own loops: a plain model, saved in the middle of a hook."""

from __future__ import annotations

from typing import Any

import pytest


def saved_in(hook: str, limit: int, stop: int) -> dict[str, Any]:
    """A checkpoint's progress as Lightning saves it in a hook of step `stop`, before and after it is put right."""
    import tempfile
    from pathlib import Path

    import lightning.pytorch as pl
    import torch

    from nxdt_nemo.lightning import loops

    class Line(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch):
            return self.layer(batch).sum()

        def validation_step(self, batch):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    class Saves(pl.Callback):
        def save(self, trainer, where):
            if where == hook and trainer.global_step == stop and not Path(path).exists():
                trainer.save_checkpoint(path)

        def on_train_batch_end(self, trainer, *_):
            self.save(trainer, "on_train_batch_end")

        def on_validation_end(self, trainer, *_):
            self.save(trainer, "on_validation_end")

        def on_train_epoch_end(self, trainer, *_):
            self.save(trainer, "on_train_epoch_end")

    class Mends(pl.Callback):
        def on_train_start(self, trainer, *_):
            loop = trainer.fit_loop
            seen["before"] = loop.epoch_loop.batch_progress.current.completed
            seen["done"] = loops.finish_step(loop)
            if seen["done"] == limit:
                loops.finish_epoch(loop)
            loops.set_fetched(loop, loop.epoch_loop.batch_progress.current.processed)

        def on_train_epoch_start(self, trainer, *_):
            seen["epochs"].append((trainer.current_epoch, trainer.global_step))

        def on_validation_end(self, trainer, *_):
            seen["validated"].append(trainer.global_step)

    seen: dict[str, Any] = {"epochs": [], "validated": []}
    data = torch.utils.data.DataLoader(torch.randn(limit, 1), batch_size=1)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {"accelerator": "cpu", "max_steps": 3 * limit, "val_check_interval": 2, "num_sanity_val_steps": 0, **quiet}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/saved.ckpt"
        pl.Trainer(**fixed, callbacks=[Saves()]).fit(Line(), data, data)
        trainer = pl.Trainer(**fixed, callbacks=[Mends()])
        trainer.fit(Line(), data, data, ckpt_path=path)
    seen["ended"] = trainer.global_step
    return seen


def test_a_step_saved_at_its_end_counts_as_done(active: Any) -> None:
    seen = active(saved_in, "on_train_batch_end", 4, 3)
    assert (seen["before"], seen["done"]) == (2, 3)  # Lightning's own count is one short
    assert seen["epochs"] == [(0, 3), (1, 4), (2, 8)]
    assert seen["ended"] == 12


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_after_an_epochs_last_step_the_next_one_begins(active: Any, hook: str) -> None:
    seen = active(saved_in, hook, 4, 4)
    assert seen["done"] == 4
    assert seen["epochs"] == [(1, 4), (2, 8)]
    assert seen["validated"][-4:] == [6, 8, 10, 12]
    assert seen["ended"] == 12


@pytest.mark.parametrize(
    ("rates", "groups", "expected"),
    [([0.1, 0.1], 3, [0.1] * 3), ([0.1] * 3, 2, [0.1] * 2), ([0.1, 0.2], 2, [0.1, 0.2]), ([0.1, 0.2], 3, [0.1, 0.2])],
)
def test_a_resumed_schedule_has_a_rate_for_each_group(rates, groups, expected):
    """Experts have groups of their own with expert parallelism, and none without."""
    from types import SimpleNamespace

    from nxdt_nemo.lightning.loops import rate_for_each_group

    scheduler = SimpleNamespace(base_lrs=rates, optimizer=SimpleNamespace(param_groups=[{}] * groups))
    rate_for_each_group(scheduler)
    assert scheduler.base_lrs == expected
