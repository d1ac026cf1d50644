"""Lightning's progress, put right after a restart: a resumed epoch has as many steps as one that was not interrupted.

Room lightning/. Beside lightning.pytorch.loops.{fit_loop,training_epoch_loop}, which restore counters as they stood
in the middle of a hook: a step whose checkpoint was saved at its end counts as not done, an epoch whose last step was
saved goes on beyond its data, and steps are added to micro-batches. Called by the strategy's on_train_start, before
Lightning reads any of it. Proof: tests/lightning/test_loops.py, tests/nemo/test_resume.py.
"""

from __future__ import annotations

from typing import Any

__all__ = ["finish_epoch", "finish_step", "rate_for_each_group", "set_fetched"]

COUNTS = ("ready", "started", "processed", "completed")


def finish_step(fit_loop: Any) -> int:
    """Count the step that a checkpoint was saved after as done; returns the steps of the epoch that are."""
    progress = fit_loop.epoch_loop.batch_progress
    for tracker in (progress.total, progress.current):
        _set(tracker, tracker.processed)
    return int(progress.current.processed)


def finish_epoch(fit_loop: Any) -> None:
    """Begin the next epoch: the checkpoint was saved after the last step of one."""
    epoch_loop = fit_loop.epoch_loop
    optimizers = epoch_loop.automatic_optimization.optim_progress
    for progress in (epoch_loop.batch_progress, epoch_loop.scheduler_progress, optimizers):
        progress.reset_on_run()
    if fit_loop.restarting:  # else Lightning knows that the epoch was finished
        for tracker in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
            _set(tracker, max(tracker.completed, tracker.processed) + 1)


def set_fetched(fit_loop: Any, batches: int) -> None:
    """Tell the data fetcher how many batches of this epoch were fetched before the restart."""
    progress = fit_loop.epoch_loop.batch_progress
    progress.is_last_batch = False
    fit_loop._data_fetcher.fetched = batches - progress.current.ready  # the loop adds its steps to it


def rate_for_each_group(scheduler: Any) -> None:
    """Fit a scheduler that was saved with another number of parameter groups to those of its optimizer.

    Experts have groups of their own with expert parallelism, and none without. It would leave groups that it has no
    rate for as they are. Rates that differ are left alone: nothing says which belongs where.
    """
    rates, groups = getattr(scheduler, "base_lrs", []), scheduler.optimizer.param_groups
    if len(set(rates)) == 1 and len(rates) != len(groups):
        scheduler.base_lrs = rates[:1] * len(groups)


def _set(tracker: Any, count: int) -> None:
    for name in COUNTS:
        setattr(tracker, name, count)
