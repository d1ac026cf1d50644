"""The stock script on the xla lane, on XLA:CPU: the cpu lane's curve, and nothing else to do than to ask for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nxdt_nemo.testing.parity import relative

from .conftest import Run

STEPS = ("trainer.max_steps=6", "trainer.val_check_interval=3", "exp_manager.create_checkpoint_callback=false")
TWO = "trainer.devices=2"
LAYOUTS = {
    "one rank": (),
    "two stages, one embedding": (
        TWO,
        "model.pipeline_model_parallel_size=2",
        "model.share_embeddings_and_output_weights=True",
    ),
    "tensor and sequence parallel": (TWO, "model.tensor_model_parallel_size=2", "model.sequence_parallel=True"),
    "data parallel": (TWO, "model.tensor_model_parallel_size=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("with_torch_xla")
def test_the_cpu_lanes_losses(train: Callable[..., Run], layout: str) -> None:
    """What rank 0 logs: with two stages the other one's loss."""
    runs = [
        train(*STEPS, *LAYOUTS[layout], name=lane, environment={"NXDT_NEMO_RUNTIME": lane}) for lane in ("cpu", "xla")
    ]
    for run in runs:
        assert run.code == 0, run.output[-3000:]
    assert "nxdt_nemo: lane xla" in runs[1].output
    for curve in ("reduced_train_loss", "val_loss", "grad_norm"):
        expected, found = (run.curve(curve) for run in runs)
        assert expected.keys() == found.keys() and len(expected) >= 2
        assert relative([*found.values()], [*expected.values()]) <= 1e-6, curve
    assert len({*runs[0].curve().values()}) == 6
