"""The stock script on the neuron lane's stand-in, two ranks: the cpu lane's curve, nothing else to do than to ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nxdt_nemo.testing.neuron_standin import environment
from nxdt_nemo.testing.parity import relative

from .conftest import Run

STEPS = ("trainer.max_steps=4", "trainer.val_check_interval=2", "exp_manager.create_checkpoint_callback=false")


@pytest.mark.slow
@pytest.mark.ranks
def test_the_cpu_lanes_losses(neuron_standin: Path, train: Callable[..., Run]) -> None:
    ranks = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    lanes = {"cpu": {"NXDT_NEMO_RUNTIME": "cpu"}, "neuron": environment(neuron_standin)}
    runs = [train(*STEPS, *ranks, name=lane, environment=variables, seconds=900) for lane, variables in lanes.items()]
    for run in runs:
        assert run.code == 0, run.output[-3000:]
    assert "nxdt_nemo: lane neuron" in runs[1].output
    for curve in ("reduced_train_loss", "val_loss", "grad_norm"):
        expected, found = (run.curve(curve) for run in runs)
        assert expected.keys() == found.keys() and len(expected) >= 2
        assert relative([*found.values()], [*expected.values()]) <= 1e-6, curve
