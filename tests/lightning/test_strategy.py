"""A checkpoint is complete or it is invisible, at whatever moment a rank is killed; and whose numbers a step draws."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from nxdt_nemo import folders
from nxdt_nemo.lightning import strategy as module
from nxdt_nemo.lightning.strategy import NeuronStrategyMixin


@pytest.fixture(autouse=True)
def _cpu_lane(monkeypatch):
    from nxdt_nemo.runtime.select import forget

    monkeypatch.setenv("NXDT_NEMO_RUNTIME", "cpu")
    forget()
    yield
    forget()


class Base:
    """What the mixin stands before: a strategy of Lightning's, on one rank."""

    is_global_zero, global_rank, world_size = True, 0, 1

    def __init__(self) -> None:
        self.barriers: list[str] = []

    def barrier(self, name: str) -> None:
        self.barriers.append(name)

    def optimizer_step(self, closure: Callable[[], Any]) -> Any:
        return closure()

    def on_train_start(self) -> None: ...

    def on_train_batch_start(self, *_: Any) -> None: ...

    def on_validation_start(self) -> None: ...

    def on_validation_end(self) -> None: ...

    def on_exception(self, exception: BaseException) -> None: ...


class Strategy(NeuronStrategyMixin, Base):
    pass


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "shards").mkdir()
        (folder / "shards" / "0").write_text(text)
        (folder / "metadata").write_text(text)

    return write


def read(folder: Path) -> list[str]:
    """What a checkpoint holds; [] where there is none."""
    if not folder.is_dir():
        return []
    return [(folder / "metadata").read_text(), (folder / "shards" / "0").read_text(), *os.listdir(folder / "rng")]


def complete(text: str) -> list[str]:
    return [text, text, "rank_00000.safetensors"]


def visible(parent: Path) -> set[str]:
    """The folders that NeMo takes for checkpoints: those without its mark beside them."""
    folders = {path.name for path in parent.glob("*") if path.is_dir()}
    return {name for name in folders if not (parent / f"{name}-unfinished").exists()}


def test_saved_and_saved_again(tmp_path):
    folder, strategy = tmp_path / "below" / "step=4", Strategy()
    for text in ("one", "two"):
        strategy.save_complete(folder, writer(text))
        assert read(folder) == complete(text)
        assert os.listdir(folder.parent) == ["step=4"]
    assert strategy.barriers == ["checkpoint folder", "checkpoint written", "checkpoint committed"] * 2


def test_a_writer_that_raises_leaves_the_old_one(tmp_path):
    folder, strategy = tmp_path / "step=4", Strategy()

    def fails(partial: Path) -> None:
        writer("two")(partial)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        strategy.save_complete(folder, fails)
    assert visible(tmp_path) == set()
    assert (tmp_path / "step=4.incomplete").is_dir()
    strategy.save_complete(folder, writer("one"))
    with pytest.raises(OSError, match="disk full"):
        strategy.save_complete(folder, fails)
    assert read(folder) == complete("one")
    assert visible(tmp_path) == {"step=4"}
    strategy.save_complete(folder, writer("three"))  # what was left behind is in nobody's way
    assert read(folder) == complete("three")
    assert os.listdir(tmp_path) == ["step=4"]


def killed_at(folder: Path, number: int, after: bool, swaps: bool, text: str) -> int:
    """Save in a process that is killed before (or after) its `number`th step; its exit code."""

    def run() -> None:
        count = 0

        def step(real: Callable[..., Any]) -> Callable[..., Any]:
            def stepping(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = real(*args, **kwargs)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return stepping

        os.replace, os.fsync = step(os.replace), step(os.fsync)
        shutil.rmtree = step(shutil.rmtree)
        Path.touch, Path.unlink, Path.mkdir = step(Path.touch), step(Path.unlink), step(Path.mkdir)  # type: ignore[method-assign]
        folders.exchange = step(folders.exchange if swaps else lambda one, other: False)
        Strategy().save_complete(folder, writer(text))
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.parametrize("after", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("swaps", [True, False], ids=["renameat2", "two renames"])
@pytest.mark.parametrize("old", ["", "one"], ids=["new", "replacing"])
def test_killed_at_every_step(tmp_path, old, swaps, after):
    outcomes = set()
    for number in range(1, 60):
        parent = tmp_path / f"killed at {number}"
        folder = parent / "step=4"
        if old:
            Strategy().save_complete(folder, writer(old))
        code = killed_at(folder, number, after, swaps, "two")
        assert code in (0, -signal.SIGKILL)
        found = read(folder)
        if found == [] and old:
            # Without renameat2 the old one is between names for one moment; the next save gives it back.
            assert not swaps
            assert read(parent / "step=4.replaced") == complete(old)
            Strategy().save_complete(parent / "step=8", writer("later"))
            found = read(folder)
        assert found in (complete(old) if old else [], complete("two")), number
        assert visible(parent) <= {"step=4", "step=8", "step=4.replaced"}
        outcomes.add("new" if found == complete("two") else "old")
        Strategy().save_complete(folder, writer("three"))  # and it goes on from there
        assert read(folder) == complete("three")
        assert visible(parent) <= {"step=4", "step=8"}
        if code == 0:
            break
    else:
        pytest.fail("the save has more steps than were tried")
    assert outcomes == {"old", "new"}  # the kills were on both sides of the commit


def test_a_replaced_checkpoint_is_there_for_its_reader(tmp_path):
    Strategy().save_complete(tmp_path / "step=4", writer("one"))
    for _ in range(2):  # whoever else is as far
        (tmp_path / "step=4").rename(tmp_path / "step=4.replaced")
        left = [tmp_path / "step=4.replaced"] * 2
        folders.recover(left)
        assert os.listdir(tmp_path) == ["step=4"]
    (tmp_path / "step=4").rename(tmp_path / "step=4.replaced")
    Strategy().recover(tmp_path / "step=4")
    assert read(tmp_path / "step=4") == complete("one")


def test_an_error_of_the_swap_is_not_taken_for_a_missing_feature(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        folders.exchange(tmp_path / "a", tmp_path / "gone")


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced: set[str] = set()
    real, names = os.fsync, {}

    def fsync(handle: int) -> None:
        synced.add(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        real(handle)

    def replace(source: Path, target: Path) -> None:
        names["before the rename"] = set(synced)
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    Strategy().save_complete(tmp_path / "step=4", writer("one"))
    inside = {"", "/metadata", "/shards", "/shards/0", "/rng", "/rng/rank_00000.safetensors"}
    assert {f"step=4.incomplete{name}" for name in inside} <= names["before the rename"]
    assert "." in synced  # the folder above, which holds the name


def a_cut_one_among_nemos_best(folder: str) -> list[Any]:
    """NeMo's callback over a complete checkpoint, and a better one that was killed while it was written."""
    from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

    parent = Path(folder)
    Strategy().save_complete(parent / "gpt--val_loss=6.00-step=4", writer("one"))
    code = killed_at(parent / "gpt--val_loss=5.00-step=8", 9, False, True, "two")
    callback = NeMoModelCheckpoint(dirpath=folder, monitor="val_loss", mode="min", save_top_k=1, filename="gpt")
    callback.best_k_models = {}
    callback.nemo_topk_check_previous_run()
    left = sorted(path.name for path in parent.iterdir())
    NeMoModelCheckpoint._remove_unfinished_checkpoints(folder)
    return [code, Path(callback.best_model_path).name, left, sorted(path.name for path in parent.iterdir())]


@pytest.mark.ranks
def test_nemo_does_not_rank_a_cut_checkpoint_and_clears_it_away(active, tmp_path):
    code, best, left, cleared = active(a_cut_one_among_nemos_best, str(tmp_path))
    assert code == -signal.SIGKILL
    assert "gpt--val_loss=5.00-step=8.incomplete" in left
    assert best == "gpt--val_loss=6.00-step=4"
    assert cleared == ["gpt--val_loss=6.00-step=4"]


# --- whose numbers a step draws ------------------------------------------------------------------------


def stepping(between: Callable[[Strategy], Any]) -> list[float]:
    """A number of each of three batches and steps, with something between them."""
    strategy, drawn = Strategy(), []
    torch.manual_seed(0)
    for _ in range(3):
        drawn.append(float(torch.rand(1)))  # Lightning fetches the batch first
        strategy.on_train_batch_start()
        strategy.optimizer_step(lambda: drawn.append(float(torch.rand(1))))
        between(strategy)
    return drawn


def validate(strategy: Strategy) -> None:
    strategy.on_validation_start()
    torch.rand(7)
    strategy.on_validation_end()


def test_a_validation_and_a_save_leave_no_trace(tmp_path):
    def save(strategy: Strategy) -> None:
        strategy.save_complete(tmp_path / "step", lambda _: torch.rand(7))

    plain = stepping(lambda _: None)
    assert stepping(validate) == stepping(save) == plain
    assert len(set(plain)) == 6, "a batch has numbers of its own"
    assert stepping(lambda _: torch.rand(7)) != plain  # what a callback draws is its user's


def test_the_states_of_a_checkpoint_count_from_the_next_step(tmp_path):
    strategy = Strategy()
    torch.manual_seed(0)
    strategy.optimizer_step(lambda: torch.rand(1))
    strategy.on_validation_start()
    torch.rand(5)
    strategy.save_complete(tmp_path / "step=1", writer("one"))  # as callbacks do at a validation's end
    strategy.on_validation_end()
    expected = torch.rand(3)
    resumed = Strategy()
    resumed.lightning_module = MagicMock()  # type: ignore[attr-defined]
    resumed.restore_rng(tmp_path / "step=1")
    torch.rand(2)  # whatever a start draws
    resumed.on_train_start()
    assert torch.equal(torch.rand(3), expected)


def drawing() -> list[Any]:
    """What a data set drew for each batch of three epochs, and the order of its rows in each."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader, Dataset

    class Drawing(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> Any:
            return torch.tensor([row, random.random(), np.random.rand(), torch.rand(()).item()])

    class Model(pl.LightningModule):
        def training_step(self, batch: Any) -> Any:
            found.append(batch[0].tolist())
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    class OnRanks(NeuronStrategyMixin, DDPStrategy):
        pass

    found: list[list[float]] = []
    model = Model()
    model.layer = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(4, 1))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    plan = {"max_epochs": 3, "use_distributed_sampler": False, "devices": 1, "accelerator": "neuron"}
    pl.Trainer(strategy=OnRanks(), **plan | quiet).fit(model, DataLoader(Drawing(), shuffle=True))
    return [[row[1:] for row in found], [[row[0] for row in found[at : at + 4]] for at in (0, 4, 8)]]


@pytest.mark.ranks
def test_a_data_set_that_draws_goes_on_drawing(active):
    drawn, orders = active(drawing)
    for stream in zip(*drawn, strict=True):
        assert len(set(stream)) == 12
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_newest_strategy_is_not_kept_alive():
    class Environment:
        creates_processes_externally = True

    strategy = Strategy()
    strategy.cluster_environment = Environment()  # type: ignore[attr-defined]
    strategy._configure_launcher()
    assert module.newest_strategy() is strategy
    del strategy
    assert module.newest_strategy() is None


def test_an_error_of_whoever_asked_is_none_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls on_exception before its teardown, which has to follow."""
    from nxdt_nemo.runtime import current

    salvage, settle = MagicMock(side_effect=ValueError("a logger's")), MagicMock()
    monkeypatch.setattr(type(current()), "salvage", salvage)
    monkeypatch.setattr(type(current()), "settle", settle)
    Strategy().on_exception(KeyboardInterrupt())
    assert (salvage.call_count, settle.call_count) == (1, 0)


def test_the_lane_looks_at_ranks_once_they_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from nxdt_nemo.runtime import current

    done: list[str] = []
    monkeypatch.setattr(Strategy, "setup_distributed", lambda _: done.append("distributed"), raising=False)
    monkeypatch.setattr(type(current()), "ranks_are_up", lambda _: done.append("looked"))
    Strategy().bring_up_ranks()
    assert done == ["distributed", "looked"]


def test_the_lane_knows_its_rank_before_the_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    from nxdt_nemo.nemo.collections.nlp.modules.common.megatron import megatron_init
    from nxdt_nemo.runtime import current

    done: list[Any] = []
    strategy = Strategy()
    monkeypatch.setattr(megatron_init, "newest_strategy", lambda: strategy)
    monkeypatch.setattr(type(current()), "ranks_are_coming", lambda _, *place: done.append(place))
    monkeypatch.setattr(Strategy, "bring_up_ranks", lambda _: done.append("joined"))
    megatron_init.initialize_model_parallel_for_nemo(lambda **_: done.append("seeded"), global_rank=1, world_size=2)
    assert done == [(1, 2), "seeded", "joined"]
