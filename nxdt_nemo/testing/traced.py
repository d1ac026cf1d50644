"""Our side of a parity table on a lane that traces steps, and what each step made the device do.

Room testing/. Runs in a rank of a pool with TRACED_ENV, init=ACTIVE and group=False: the lane brings the rank up.
Losses and norms are read once, at the end. Proof: tests/megatron/test_xla.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nxdt_nemo.testing.mistakes import Fault, mistake
from nxdt_nemo.testing.ours import (
    forget_groups,
    gradients_of,
    load_checkpoint,
    save_checkpoint,
    set_up,
    update,
)
from nxdt_nemo.testing.pool import lane_here
from nxdt_nemo.testing.recipe import Layout, Recipe

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["TRACED_ENV", "Traced", "train"]

TRACED_ENV = {"NXDT_NEMO_RUNTIME": "xla", "NXDT_NEMO": "0"}


@dataclass
class Traced:
    """losses and grad_norms of each step, and what the device did in it: see runtime/xla/metrics.py."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    steps: list[dict[str, int]] = field(default_factory=list)


def train(
    recipe: Recipe,
    weights: dict[str, torch.Tensor],
    layout: Layout,
    steps: int | range,
    fault: Fault = "",
    resume: Path | None = None,
    save: Path | None = None,
    fields: Mapping[str, Any] | None = None,
    ddp: Mapping[str, Any] | None = None,
) -> Traced:
    """One rank's part of some steps, counted from 0 or these; losses on a last stage only.

    resume, save   megatron-core distributed checkpoints to begin with and to end with
    fields         further ones of the TransformerConfig
    ddp            further ones of the DistributedDataParallelConfig
    """
    from nxdt_nemo.runtime.xla.metrics import counters, since, wait

    lane = lane_here()
    training = set_up(recipe, weights, layout, ddp, fields)
    if resume is not None:
        load_checkpoint(training.model, training.optimizer, resume, "")
    lane.cut()
    lane.synchronize()
    report, kept = Traced(), []
    before = counters()
    with mistake(fault, training):
        for step in range(steps) if isinstance(steps, int) else steps:
            losses = gradients_of(training, recipe, layout, step, read=lambda loss: loss.clone())
            norm = update(training.optimizer, recipe, step, read=lambda found: found)
            kept.append(([sum(losses) / len(losses)] if losses else [], norm))
            lane.step_boundary()
            wait()
            report.steps.append(since(before))
            before = counters()
    report.losses = [float(loss) for losses, _ in kept for loss in losses]
    report.grad_norms = [float(norm) for _, norm in kept]
    if save is not None:
        save_checkpoint(training.model, training.optimizer, save)
    forget_groups()
    return report
