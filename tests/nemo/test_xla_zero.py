"""The stock script with sharded optimizers on the xla lane, on XLA:CPU: the cpu lane's curve."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nxdt_nemo.testing.parity import relative

from .conftest import O2, Run

STEPS = ("trainer.max_steps=6", "trainer.val_check_interval=6", "exp_manager.create_checkpoint_callback=false")


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
@pytest.mark.parametrize(
    ("name", "precision", "limit"),
    [
        ("distributed_fused_adam", (), 1e-6),
        ("distributed_fused_adam", O2, 1e-3),
        ("mcore_distributed_optim", (), 1e-6),
    ],
)
def test_the_cpu_lanes_losses(train: Callable[..., Run], name: str, precision: tuple[str, ...], limit: float) -> None:
    arguments = (*STEPS, *precision, f"model.optim.name={name}")
    runs = [train(*arguments, name=lane, environment={"NXDT_NEMO_RUNTIME": lane}) for lane in ("cpu", "xla")]
    for run in runs:
        assert run.code == 0, run.output[-3000:]
    expected, found = (run.curve() for run in runs)
    assert expected.keys() == found.keys() and len(expected) == 6
    assert relative([*found.values()], [*expected.values()]) <= limit
