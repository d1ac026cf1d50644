"""A run that was killed and resumed is the run that was not killed, to the bit; half a checkpoint is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = pytest.mark.ranks

DIES = Path(__file__).with_name("dies_at.py")
# Stock dropout: with 0 a random stream that nobody restored would not show.
STEPS = (
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
)
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
ADAMW = ("model.optim.name=adamw",)


@pytest.mark.parametrize("layout", [(), TP2, ADAMW], ids=["one rank", "tp2", "adamw"])
def test_killed_and_resumed_equals_uninterrupted(train: Callable[..., Run], layout: tuple[str, ...]) -> None:
    whole = train(*STEPS, *layout, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    killed = train(*STEPS, *layout, name="killed", script=DIES, environment={"DIE_AT": "6"})
    assert killed.code != 0
    assert max(killed.curve("global_step").values(), default=0) < 7

    resumed = train(*STEPS, *layout, name="killed")
    assert resumed.code == 0, resumed.output[-3000:]
    expected, found = whole.curve(), resumed.curve()
    assert len(expected) == 8
    later = sorted(expected)[4:]
    assert [found[step] for step in later] == [expected[step] for step in later]
    assert len(set(expected.values())) == 8  # losses that differ from step to step, not a constant


def test_a_checkpoint_that_was_cut_short_is_not_resumed(train: Callable[..., Run]) -> None:
    killed = train(*STEPS, name="cut", script=DIES, environment={"DIE_IN_SAVE": "8"})
    assert killed.code != 0
    folders = {path.name for path in (killed.folder / "checkpoints").iterdir() if path.is_dir()}
    assert any(name.endswith(".incomplete") and "step=8" in name for name in folders)
    assert not any("step=8" in name and not name.endswith(".incomplete") for name in folders)

    resumed = train(*STEPS, name="cut")
    assert resumed.code == 0, resumed.output[-3000:]
    assert "step=4" in resumed.output.split("Restoring states from the checkpoint path at ")[1].split("\n")[0]
