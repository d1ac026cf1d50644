"""A run that was killed and resumed is the run that was not killed, to the bit; half a checkpoint is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.script_run import read_tensors

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
# NeMo takes interleaved pipelines with megatron_amp_O2 only, which it takes in half precision only.
PP2 = ("trainer.devices=2", "model.pipeline_model_parallel_size=2", "model.num_layers=4")
PP2 += ("trainer.precision=bf16", "model.megatron_amp_O2=True")
VPP2 = (*PP2, "model.virtual_pipeline_model_parallel_size=2")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2, (), ADAMW, VPP2], ids=["tp2", "one rank", "adamw", "pp2vpp2"])
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
    assert resumed.curve("val_loss") == whole.curve("val_loss")


@pytest.mark.slow
def test_an_interleaved_pipeline_goes_on_from_another(train: Callable[..., Run]) -> None:
    """Chunks change in which order layers and micro-batches are computed, and nothing that is computed.

    A norm is added up in another order, so none clips here.
    """
    keys = ("trainer.max_steps=8", "trainer.val_check_interval=4", "trainer.limit_val_batches=2")
    keys += ("trainer.gradient_clip_val=1000", "exp_manager.checkpoint_callback_params.save_top_k=-1")
    plain = train(*keys, *PP2, name="plain")
    assert plain.code == 0, plain.output[-3000:]
    (saved,) = (plain.folder / "checkpoints").glob("*step=4-*.0")
    chunked = train(*keys, *VPP2, f"+exp_manager.resume_from_checkpoint='{saved}'", name="chunked")
    assert chunked.code == 0, chunked.output[-3000:]
    for curve in ("reduced_train_loss", "val_loss"):
        later = {step: value for step, value in plain.curve(curve).items() if step >= 4}
        assert chunked.curve(curve) == later and later, curve


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_short_is_not_resumed(train: Callable[..., Run]) -> None:
    killed = train(*STEPS, name="cut", script=DIES, environment={"DIE_IN_SAVE": "8"})
    assert killed.code != 0
    folders = {path.name for path in (killed.folder / "checkpoints").iterdir() if path.is_dir()}
    assert any(name.endswith(".incomplete") and "step=8" in name for name in folders)
    assert not any("step=8" in name and not name.endswith(".incomplete") for name in folders)

    resumed = train(*STEPS, name="cut")
    assert resumed.code == 0, resumed.output[-3000:]
    assert "step=4" in resumed.resumed_from


# --- past an epoch's end --------------------------------------------------------------------------------

EPOCHS = (*STEPS[1:], "trainer.max_steps=9", "+trainer.limit_train_batches=4", "trainer.val_check_interval=2")
SHARDED = ("trainer.devices=2", "model.optim.name=distributed_fused_adam")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), SHARDED], ids=["one rank", "dp2, sharded"])
def test_resumed_at_an_epochs_end_and_within_the_next(train: Callable[..., Run], layout: tuple[str, ...]) -> None:
    """All layouts, optimizers and places: tools/resume.py."""
    whole = train(*EPOCHS, *layout, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    expected = whole.curve()
    assert len(set(expected.values())) == 9
    assert whole.curve("epoch") == {step: step // 4 for step in range(9)}
    for step in (4, 6):
        (saved,) = (whole.folder / "checkpoints").glob(f"*step={step}-*.0")
        resumed = train(*EPOCHS, *layout, f"+exp_manager.resume_from_checkpoint='{saved}'", name=f"from {step}")
        assert resumed.code == 0, resumed.output[-3000:]
        for curve in ("reduced_train_loss", "val_loss", "lr", "epoch", "consumed_samples"):
            later = {at: value for at, value in whole.curve(curve).items() if at >= step}
            assert {at: value for at, value in resumed.curve(curve).items() if at >= step} == later, curve
        ends = [read_tensors(*(run.folder / "checkpoints").glob("*-last")) for run in (whole, resumed)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.slow
def test_a_checkpoint_whose_name_does_not_count_samples(train: Callable[..., Run]) -> None:
    """NeMo takes the samples consumed from the name, and none where it does not say."""
    keys = (*STEPS, "exp_manager.checkpoint_callback_params.filename='run-{step}'")
    whole = train(*keys, name="whole")
    assert whole.code == 0, whole.output[-3000:]
    (saved,) = (whole.folder / "checkpoints").glob("*step=4")
    resumed = train(*keys, f"+exp_manager.resume_from_checkpoint='{saved}'", name="rest")
    assert resumed.code == 0, resumed.output[-3000:]
    for curve in ("reduced_train_loss", "consumed_samples"):
        assert resumed.curve(curve) == {step: value for step, value in whole.curve(curve).items() if step >= 4}


# --- which checkpoint, after a kill between two steps of a save ------------------------------------------


def checkpoint(folder: Path, name: str, *, marked: bool = False) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "metadata.json").write_text("{}")
    if marked:
        (folder / f"{name}-unfinished").touch()


KILLED = [  # what a kill left, marked ones with a star; what is resumed
    (["a-step=2", "a-step=2-last"], "a-step=2-last"),
    (["a-step=2", "a-step=2-last", "a-step=4"], "a-step=4"),
    (["a-step=2-last", "a-step=4", "a-step=4-last"], "a-step=4-last"),
    (["a-step=9-last", "a-step=10-last"], "a-step=10-last"),  # as numbers
    (["a-step=2-last*", "a-step=4", "a-step=4-last"], "a-step=4-last"),
    (["a-step=2-last", "a-step=4.incomplete*", "a-step=4-last.incomplete*"], "a-step=2-last"),
    (["a-step=2", "a-step=4"], None),  # save_last: False resumes nothing, as upstream
    (["a-step=2", "a-step=2-last.replaced"], "a-step=2-last"),  # between the two renames of a replacement
    (["a-step=2-last", "a-step=2-end"], None),  # upstream says that the run has ended
    ([], None),
]


def choose(folder: Path) -> tuple[str | None, str | None, str]:
    """What the trainer gets, what newest() then finds, and NeMo's own error without us."""
    from types import SimpleNamespace

    from nemo.utils import exp_manager

    from nxdt_nemo.nemo.utils.exp_manager import newest

    trainer: Any = SimpleNamespace(ckpt_path=None)
    named = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True}
    error = ""
    try:
        exp_manager.check_resume(trainer, str(folder), **named)
    except ValueError as raised:
        error = str(raised)
    found = newest(folder / "checkpoints")
    return trainer.ckpt_path and Path(trainer.ckpt_path).name, found and found.name, error


@pytest.mark.parametrize(("left", "expected"), KILLED)
def test_the_newest_complete_checkpoint_is_resumed(
    active: Callable[..., Any], tmp_path: Path, left: list[str], expected: str | None
) -> None:
    for name in left:
        checkpoint(tmp_path / "checkpoints", name.removesuffix("*"), marked=name.endswith("*"))
    taken, found, error = active(choose, tmp_path)
    assert found == expected
    assert taken == expected
    assert bool(error) == ("a-step=2-end" in left)


def test_nemo_stops_there_by_itself(tmp_path: Path, gloo: Any) -> None:
    """Else the record check-resume could go."""
    for name in ("a-step=2-last", "a-step=4-last"):
        checkpoint(tmp_path / "checkpoints", name)
    assert "Multiple checkpoints" in gloo(1, stock, tmp_path, init=ACTIVE, env=ACTIVE_ENV)[0]


def stock(folder: Path) -> str:
    from types import SimpleNamespace

    from nemo.utils import exp_manager

    try:
        exp_manager.check_resume.__wrapped__(SimpleNamespace(ckpt_path=None), str(folder), resume_if_exists=True)
    except ValueError as raised:
        return str(raised)
    return ""
