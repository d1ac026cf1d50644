"""NeMo's whole step, with its progress bar and preemption callback on, reads nothing back that nobody looks at."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("counts_reads.py")


@pytest.mark.slow
@pytest.mark.parametrize("precision", [["32", "False"], ["bf16", "True"]], ids=["fp32", "bf16-O2"])
def test_a_step_reads_nothing_back(train, precision):
    run = train(
        "trainer.max_steps=8",
        "trainer.devices=2",
        "trainer.val_check_interval=8",
        f"trainer.precision={precision[0]}",
        f"model.megatron_amp_O2={precision[1]}",
        "trainer.log_every_n_steps=1000",
        "exp_manager.create_preemption_callback=True",
        "exp_manager.create_checkpoint_callback=False",
        "exp_manager.resume_if_exists=False",
        script=SCRIPT,
    )
    assert run.code == 0, run.output
    assert "Epoch 0" in run.output, "there is a bar"
    found = dict(json.loads(line) for line in re.findall(r"READS (.*)", run.output))
    assert found == {0: {}, 1: {}}
