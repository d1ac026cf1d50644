"""The keys of `exp_manager:` in real runs: what they promise is in the folder of the run.

docs/exp_manager.md lists them all. What is refused instead is in tests/config/test_exp_manager.py.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = pytest.mark.ranks

Train = Callable[..., Run]
EXP = "exp_manager"
SAVES = "exp_manager.checkpoint_callback_params"
STOPS = Path(__file__).with_name("stops_at.py")
DIES = Path(__file__).with_name("dies_at.py")
TP2 = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
# Stock dropout: with 0 a random stream that nobody restored would not show.
STEPS = (
    "trainer.max_steps=6",
    "trainer.val_check_interval=4",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
)
ASYNC = f"+{SAVES}.async_save=true"


def saved_steps(run: Run) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints among the best, and of those that end with -last. Fails for anything unfinished."""
    best: list[int] = []
    last: list[int] = []
    for path in (run.folder / "checkpoints").iterdir():
        assert "incomplete" not in path.name and "unfinished" not in path.name, path.name
        if path.is_dir():
            assert (path / "metadata.json").is_file() and (path / ".metadata").is_file(), path.name
            step = int(path.name.partition("step=")[2].partition("-")[0])
            (last if path.name.endswith("-last") else best).append(step)
    return sorted(best), sorted(last)


@pytest.mark.parametrize("layout", [(), pytest.param(TP2, marks=pytest.mark.slow)], ids=["one rank", "tp2"])
def test_a_preempted_run_saves_and_goes_on(train: Train, layout: tuple[str, ...]) -> None:
    """Asynchronous saves, too: the one that the preemption asks for is complete when the process has ended."""
    keys = (*STEPS, *layout, ASYNC, f"{EXP}.create_preemption_callback=true", f"{SAVES}.save_top_k=-1")
    whole = train(*STEPS, *layout, f"{SAVES}.save_top_k=-1", name="whole")
    assert whole.code == 0, whole.output[-3000:]
    assert saved_steps(whole) == ([4, 6], [6])

    stopped = train(*keys, name="stopped", script=STOPS, environment={"STOP_AT": "2"})
    assert stopped.code == 0, stopped.output[-3000:]
    assert "Received SIGTERM" in stopped.output
    assert saved_steps(stopped) == ([], [3])

    resumed = train(*keys, name="stopped")
    assert resumed.code == 0, resumed.output[-3000:]
    assert "Scheduled async checkpoint save" in resumed.output
    assert saved_steps(resumed)[1] == [6]
    expected, found = whole.curve(), resumed.curve()
    assert len(set(expected.values())) == 6
    assert {step: found[step] for step in (3, 4, 5)} == {step: expected[step] for step in (3, 4, 5)}


def test_when_what_and_where_to_save_and_log(train: Train) -> None:
    """Keys that do not meet each other, in one run that stops early."""
    run = train(
        "trainer.max_steps=8",
        "trainer.val_check_interval=5",
        f"+{SAVES}.every_n_train_steps=1",
        f"+{SAVES}.every_n_epochs=null",
        f"{SAVES}.monitor=reduced_train_loss",
        f"{SAVES}.filename='x-{{reduced_train_loss:.3f}}-{{step}}-{{lr:.5f}}'",
        f"{SAVES}.save_top_k=2",
        f"{SAVES}.model_parallel_size=3",
        f"+{EXP}.create_early_stopping_callback=true",
        f"+{EXP}.early_stopping_callback_params={{monitor: val_loss, stopping_threshold: 100}}",
        f"+{EXP}.log_delta_step_timing=true",
        f"+{EXP}.log_parameter_norm=true",
        f"+{EXP}.log_gradient_norm=true",
        f"{EXP}.create_wandb_logger=true",
        f"+{EXP}.wandb_logger_kwargs={{project: p, name: n}}",
        environment={"WANDB_MODE": "offline"},
    )
    assert run.code == 0, run.output[-3000:]
    losses = run.curve()
    assert sorted(losses) == [0, 1, 2, 3, 4]  # the first validation stops it
    best = sorted(sorted(losses, key=losses.__getitem__)[:2])
    assert saved_steps(run) == ([step + 1 for step in best], [5])
    names = [path.name for path in (run.folder / "checkpoints").iterdir()]
    assert any(name.startswith(f"x-reduced_train_loss={losses[best[0]]:.3f}-step={best[0] + 1}-lr=") for name in names)
    assert list((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert "train_step_timing in s" in run.output
    assert not run.curve("train_step_timing in s")  # printed, not logged
    assert run.curve("gradient_norm") == pytest.approx(run.curve("grad_norm"), rel=1e-6)  # NeMo's own
    norms = run.curve("parameter_norm")
    assert norms.keys() == losses.keys() and len(set(norms.values())) == 5


def test_nemo_files_and_dropped_optimizer_states(train: Train) -> None:
    run = train(
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        f"{SAVES}.save_top_k=-1",
        f"{SAVES}.save_nemo_on_train_end=true",
        f"{SAVES}.always_save_nemo=true",
        f"+{SAVES}.save_last_n_optim_states=1",
        f"{EXP}.log_tflops_per_sec_per_gpu=true",
    )
    assert run.code == 0, run.output[-3000:]
    assert saved_steps(run) == ([2, 4], [4])
    kept = {step: "optimizer" in _keys(run, step) for step in (2, 4)}
    assert kept == {2: False, 4: True}
    with tarfile.open(run.folder / "checkpoints" / "demo_llama.nemo") as archive:
        names = archive.getnames()
    assert any(name.endswith("model_config.yaml") for name in names)
    assert any("model_weights" in name and name.endswith(".distcp") for name in names)
    assert run.curve("train_step_timing in s")
    assert len(run.curve()) == 4


def _keys(run: Run, step: int) -> str:
    """The tensors' names in the checkpoint of a step."""
    (folder,) = (run.folder / "checkpoints").glob(f"*step={step}-consumed_samples={step * 8}.0")
    return (folder / ".metadata").read_bytes().decode(errors="ignore")


def test_a_key_that_cannot_work_stops_before_the_ranks(train: Train) -> None:
    run = train(f"+{EXP}.ema={{enable: true}}", f"+{SAVES}.dirpath=s3://bucket/run", *TP2, seconds=60)
    assert run.code == 2
    lines = [line for line in run.output.splitlines() if line.startswith("nxdt-nemo: ")]
    assert [line.split()[1:3] for line in lines] == [
        ["demo_llama.yaml:", f"{SAVES}.dirpath=s3://bucket/run:"],
        ["demo_llama.yaml:", f"{EXP}.ema.enable=True:"],
    ]
    assert "Traceback" not in run.output
    assert not run.folder.exists()


@pytest.mark.slow
def test_time_is_up(train: Train) -> None:
    """max_time_per_run stops, saves, and a second run has as much time again; save_top_k=0 keeps -last alone."""
    keys = (
        "trainer.max_steps=100000",
        "trainer.val_check_interval=100000",
        f"+{EXP}.max_time_per_run='00:00:00:04'",
        f"{SAVES}.save_top_k=0",
        f"+{EXP}.disable_validation_on_resume=false",
        ASYNC,
    )
    first = train(*keys)
    assert first.code == 0, first.output[-3000:]
    best, (one,) = saved_steps(first)
    assert best == [] and one > 1
    second = train(*keys)
    assert second.code == 0, second.output[-3000:]
    best, (two,) = saved_steps(second)
    assert best == [] and two > one
    assert one in second.curve()


@pytest.mark.slow
def test_a_kill_while_an_asynchronous_save_is_under_way(train: Train) -> None:
    keys = (*STEPS, ASYNC, f"{SAVES}.save_top_k=-1")
    killed = train(*keys, name="cut", script=DIES, environment={"DIE_IN_SAVE": "6"})
    assert killed.code != 0
    folders = {path.name for path in (killed.folder / "checkpoints").iterdir() if path.is_dir()}
    assert any(name.endswith(".incomplete") and "step=6" in name for name in folders)
    assert not any("step=6" in name and not name.endswith(".incomplete") for name in folders)

    resumed = train(*keys, name="cut")
    assert resumed.code == 0, resumed.output[-3000:]
    assert "step=4" in resumed.output.split("Restoring states from the checkpoint path at ")[1].split("\n")[0]
    assert saved_steps(resumed)[1] == [6]


@pytest.mark.slow
def test_the_best_model_is_packed_at_the_end(train: Train) -> None:
    run = train(
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        *TP2,
        f"{SAVES}.save_top_k=1",
        f"{SAVES}.save_nemo_on_train_end=true",
        f"+{SAVES}.save_best_model=true",
        ASYNC,
    )
    assert run.code == 0, run.output[-3000:]
    assert (run.folder / "checkpoints" / "demo_llama.nemo").is_file()
    best, last = saved_steps(run)
    assert len(best) == 1 and last == [4]


@pytest.mark.slow
def test_no_checkpoint_callback(train: Train, tmp_path: Path) -> None:
    """Nor a folder of its own: exp_dir, name and version make one."""
    run = train(
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        f"{EXP}.create_checkpoint_callback=false",
        f"{EXP}.explicit_log_dir=null",
        f"{EXP}.exp_dir={tmp_path / 'run'}",
        f"{EXP}.name=mine",
        f"+{EXP}.version=v1",
        f"+{EXP}.files_to_copy=[{STOPS}]",
        f"{EXP}.resume_if_exists=false",
        f"+{SAVES}.dirpath={tmp_path / 'elsewhere'}",
    )
    assert run.code == 0, run.output[-3000:]
    assert len(run.curve()) == 2
    assert (run.folder / "mine" / "v1" / STOPS.name).read_text() == STOPS.read_text()
    assert not list(tmp_path.rglob("*.metadata"))


@pytest.mark.slow
def test_resume_from_checkpoint(train: Train, tmp_path: Path) -> None:
    """A named checkpoint of another run; its own newer one is taken when there is one."""
    first = train(*STEPS, f"{SAVES}.save_top_k=-1", name="first")
    (start,) = (first.folder / "checkpoints").glob("*step=4-*0")
    keys = (*STEPS, f"+{EXP}.resume_from_checkpoint='{start}'", f"+{SAVES}.dirpath={tmp_path / 'second/checkpoints'}")
    second = train(*keys, name="second")
    assert second.code == 0, second.output[-3000:]
    assert {step: second.curve()[step] for step in (4, 5)} == {step: first.curve()[step] for step in (4, 5)}
    assert min(second.curve()) == 4
    third = train(*keys, "trainer.max_steps=7", name="second")
    assert third.code == 0, third.output[-3000:]
    assert "second/checkpoints" in third.output.split("Restoring states from the checkpoint path at ")[1].split("\n")[0]
