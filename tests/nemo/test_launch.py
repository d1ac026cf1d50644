"""Every way in: Lightning's launcher, torchrun, an environment variable, a module, a script beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import SCRIPT, Run

pytestmark = pytest.mark.ranks

STEPS = ("trainer.max_steps=3", "trainer.val_check_interval=3", "exp_manager.create_checkpoint_callback=false")
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")


@pytest.mark.slow
def test_launchers_train_the_same(train: Callable[..., Run], tmp_path: Path) -> None:
    sibling = tmp_path / "sibling.py"
    sibling.write_text("WORD = 'found'\n")
    beside = tmp_path / "beside.py"
    beside.write_text("import sibling\nprint('SIBLING', sibling.WORD)\n" + SCRIPT.read_text())

    lightning = train(*STEPS, *TP2, name="lightning", script=beside)
    assert lightning.code == 0, lightning.output[-3000:]
    assert lightning.output.count("SIBLING found") == 2  # both ranks run the script as __main__

    torchrun = train(*STEPS, *TP2, name="torchrun", command=(*TORCHRUN, "-m", "nxdt_nemo", "run"))
    assert torchrun.code == 0, torchrun.output[-3000:]
    variable = train(*STEPS, *TP2, name="variable", command=(), environment={"NXDT_NEMO": "1"})
    assert variable.code == 0, variable.output[-3000:]

    assert len(lightning.curve()) == 3
    assert torchrun.curve() == lightning.curve()
    assert variable.curve() == lightning.curve()
    for run in (lightning, torchrun, variable):
        assert run.output.count("nxdt_nemo: lane cpu") == 1


def test_gpu_means_neuron(train: Callable[..., Run]) -> None:
    run = train(*STEPS, "trainer.accelerator=gpu", "trainer.precision=bf16", "model.megatron_amp_O2=true")
    assert run.code == 0, run.output[-3000:]
    assert "accelerator='gpu' means neuron here" in run.output
    assert len(run.curve()) == 3
