"""What a NeMo script does when trainer.fit is done, on the xla lane: its files are the callback's, its losses the cpu
lane's."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nxdt_nemo.testing.script_run import read_tensors

from .conftest import O2, Run

SCRIPT = Path(__file__).with_name("after_fit.py")
STEPS = ("trainer.max_steps=4", "trainer.val_check_interval=2", "exp_manager.create_checkpoint_callback=True")


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
@pytest.mark.parametrize(
    ("name", "precision", "limit"),
    [
        ("fused_adam", (), 1e-6),
        ("fused_adam", O2, 1e-3),
        ("distributed_fused_adam", O2, 1e-3),
    ],
)
def test_saves_validates_and_trains_again(
    train: Callable[..., Run], name: str, precision: tuple[str, ...], limit: float
) -> None:
    arguments = (*STEPS, *precision, f"model.optim.name={name}")
    lanes = ("cpu", "xla")
    runs = [
        train(*arguments, name=lane, script=SCRIPT, environment={"NXDT_NEMO_RUNTIME": lane}, seconds=900)
        for lane in lanes
    ]
    for run in runs:
        assert run.code == 0, run.output[-3000:]
        after, last = (read_tensors(run.folder / folder) for folder in ("after", "last"))
        assert after.keys() == last.keys()
        assert all(torch.equal(after[key], last[key]) for key in after)
        with tarfile.open(run.folder / "after.nemo") as packed:
            packed.extractall(run.folder / "nemo", filter="data")
        weights = read_tensors(run.folder / "nemo" / "model_weights")
        assert weights and all(torch.equal(weights[key], last[key]) for key in weights)
    expected, found = (json.loads((run.folder / "losses.json").read_text()) for run in runs)
    assert found == pytest.approx(expected, rel=limit)
    assert expected[1] < expected[0] - 0.05, "the second fit learned nothing"
