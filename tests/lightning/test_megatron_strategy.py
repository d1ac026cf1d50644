"""A LightningModule of megatron-core's layers by NeuronMegatronStrategy, as docs/examples/lightning_gpt.py has one:
every layout against one rank, resumed runs to the bit, and what is refused. No NeMo."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.script_run import run

pytestmark = pytest.mark.ranks

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "lightning_gpt.py"
PLAIN = Path(__file__).with_name("plain.py")
EPOCH = 4  # steps


def script(path: Path = SCRIPT) -> Any:
    """A script's module, imported in a rank."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fitted(folder: str, steps: list[int], **changes: Any) -> list[list[float]]:
    """The losses of runs of the tutorial's model with dropout, one after another, in a folder of checkpoints."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from nxdt_nemo.lightning import NeuronMegatronStrategy
    from nxdt_nemo.testing.ours import forget_groups

    gpt, found = script(), []
    fields = gpt.SmallGPT.fields | {"hidden_dropout": 0.1} | changes
    model = type("Model", (gpt.SmallGPT,), {"fields": fields, "val_dataloader": gpt.SmallGPT.train_dataloader})
    try:
        for last in steps:
            losses = gpt.Losses(Path(folder) / "losses.json")
            trainer = Trainer(
                accelerator="neuron",
                devices=1,
                strategy=NeuronMegatronStrategy(micro_batch_size=2),
                callbacks=[losses, ModelCheckpoint(folder, save_last=True, every_n_train_steps=3)],
                max_epochs=-1,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=1,
                max_steps=last,
            )
            trainer.fit(model(), ckpt_path="last")
            found.append(losses.found)
            assert last < EPOCH or 3.0 < trainer.callback_metrics["val_loss"] < 4.5
    finally:
        forget_groups()
    return found


SLOW = pytest.mark.slow
STOPS = [3, pytest.param(EPOCH, marks=SLOW), pytest.param(6, marks=SLOW)]  # in an epoch, at its end, in the second


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_goes_on_to_the_bit(active: Callable[..., Any], tmp_path: Path, stop: int) -> None:
    folders = [tmp_path / name for name in ("whole", "halves")]
    for folder in folders:
        folder.mkdir()
    (whole,) = active(fitted, str(folders[0]), [stop + 3])
    first, second = active(fitted, str(folders[1]), [stop, stop + 3])
    assert first == whole[:stop]
    assert second == whole[stop:]
    assert len(set(whole)) == stop + 3


def half(folder: str) -> list[list[float]]:
    """As fitted, in bfloat16 with float32 main parameters."""
    import torch

    return fitted(folder, [3, 6], bf16=True, params_dtype=torch.bfloat16)


@pytest.mark.slow
def test_bfloat16(active: Callable[..., Any], tmp_path: Path) -> None:
    """Near float32, and not the same."""
    for name in ("half", "full"):
        (tmp_path / name).mkdir()
    found = list(chain(*active(half, str(tmp_path / "half"))))
    full = list(chain(*active(fitted, str(tmp_path / "full"), [3, 6])))
    assert found == pytest.approx(full, rel=2e-2)
    assert found != pytest.approx(full, rel=1e-5)


def workers(stop: int) -> list[list[int]]:
    """The batches of an epoch that skip() begins after `stop`, and of the next, of workers that an epoch has used."""
    from torch.utils.data import DataLoader

    from nxdt_nemo.lightning.samplers import skip

    loader = DataLoader(range(EPOCH), num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    iter(loader)
    skip(loader, stop)
    return [[batch.item() for batch in loader] for _ in range(2)]


def test_persistent_workers_begin_in_the_middle(active: Callable[..., Any]) -> None:
    assert active(workers, 3) == [[3], [0, 1, 2, 3]]


def streams(stages: int) -> list[Any]:
    """What a rank draws for data: Python's and numpy's number, two epochs' orders, a worker's numbers."""
    import random

    import numpy as np
    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from nxdt_nemo.lightning import NeuronMegatronStrategy
    from nxdt_nemo.testing.ours import forget_groups

    def collate(rows: list[int]) -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    random.seed()
    strategy = NeuronMegatronStrategy(pipeline_model_parallel_size=stages)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    joined, DDPStrategy.setup_distributed = DDPStrategy.setup_distributed, lambda _: None  # type: ignore[method-assign]
    try:
        strategy.setup_distributed()
        shuffled: Any = strategy.process_dataloader(DataLoader(range(8), shuffle=True))  # type: ignore[arg-type]
        working: Any = strategy.process_dataloader(
            DataLoader(range(2), num_workers=1, collate_fn=collate)  # type: ignore[arg-type]
        )
        orders = [[row.item() for row in shuffled] for _ in range(2)]
        return [random.random(), np.random.rand(), *orders, *working]
    finally:
        DDPStrategy.setup_distributed = joined  # type: ignore[method-assign]
        forget_groups()


def test_stages_of_a_model_draw_the_same_data(gloo: Any) -> None:
    first, last = gloo(2, streams, 2, init=ACTIVE, env=ACTIVE_ENV)
    assert first == last
    assert first[2] != first[3], "a second epoch has another order"
    beside = gloo(2, streams, 1, init=ACTIVE, env=ACTIVE_ENV)
    assert all(mine != theirs for mine, theirs in zip(*beside, strict=True))  # ranks of other data


def broken(gpt: Any, how: str) -> Any:
    """The tutorial's model with a mistake; "" for none."""
    import torch

    from nxdt_nemo.lightning import NeuronMegatronStrategy

    class Model(gpt.SmallGPT):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            if how == "parameter":
                self.scale = torch.nn.Parameter(torch.ones(()))
            elif how == "buffer":
                self.register_buffer("seen", torch.zeros(()))

        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            self.automatic_optimization = how != "two"  # else Lightning itself refuses them
            return {"two": [found, found], "none": None}.get(how, found)

    if how == "tokens":
        Model.fields = Model.fields | {"calculate_per_token_loss": True}
    model = Model()
    if how == "earlier":
        piece: Any = torch.nn.Identity()
        piece.config = SimpleNamespace(**NeuronMegatronStrategy(tensor_model_parallel_size=2).layout)
        model.chunks.append(piece)
    return model


def refused(given: dict[str, Any], plan: dict[str, Any], how: str = "") -> str:
    """What a Trainer says to these arguments, and to a model that is `broken`, or plain."""
    from lightning.pytorch import Trainer

    from nxdt_nemo.errors import UserError
    from nxdt_nemo.lightning import NeuronMegatronStrategy

    try:
        strategy = NeuronMegatronStrategy(**given)
        quiet = {"logger": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator="neuron", devices=1, strategy=strategy, max_steps=1, **quiet | plan)
        trainer.fit(script(PLAIN).Line() if how == "plain" else broken(script(), how))
    except UserError as error:
        return str(error)
    return ""


REFUSED = [  # the strategy's arguments, the Trainer's, what is said
    ({"tensor_model_parallel_size": 0}, {}, "NeuronMegatronStrategy.tensor_model_parallel_size: 0 is no size"),
    ({"micro_batch_size": "2"}, {}, "NeuronMegatronStrategy.micro_batch_size: '2' is no size"),
    ({"sequence_parallel": True}, {}, "sequence_parallel: needs tensor_model_parallel_size above 1"),
    ({"virtual_pipeline_model_parallel_size": 2}, {}, "needs pipeline_model_parallel_size above 1"),
    ({"tensor_model_parallel_size": 2}, {}, "Trainer.devices: 1 ranks are not divided by 2 x 1 x 1"),
    ({"expert_model_parallel_size": 2}, {}, "expert_model_parallel_size: 2 does not divide the 1 ranks"),
    ({}, {"precision": "bf16-mixed"}, "Trainer.precision: 'bf16-mixed' has no effect here"),
    ({}, {"gradient_clip_val": 1.0}, "Trainer.gradient_clip_val: 1.0 has no effect here"),
    ({}, {"accumulate_grad_batches": 2}, "Trainer.accumulate_grad_batches: 2 has no effect here"),
]


@pytest.mark.parametrize("given, plan, said", REFUSED, ids=lambda value: str(value)[:40])
def test_refused(active: Callable[..., Any], given: dict[str, Any], plan: dict[str, Any], said: str) -> None:
    found = active(refused, given, plan)
    assert said in found, found
    assert ";" in found and "\n" not in found


def test_a_plain_module_is_sent_to_ddp(active: Callable[..., Any]) -> None:
    assert "Line is no MegatronLightningModule" in active(refused, {}, {}, "plain")


BROKEN = [  # the mistake, what is said
    ("parameter", "scale: is in no piece of the model"),
    ("buffer", "seen: is in no piece of the model"),
    ("two", "configure_optimizers: not one optimizer of megatron-core's"),
    ("none", "configure_optimizers: not one optimizer of megatron-core's"),
    ("earlier", "tensor_model_parallel_size: 2, and the strategy has 1"),
    ("tokens", "calculate_per_token_loss: True, and micro-batches count alike"),
]


@pytest.mark.parametrize("how, said", BROKEN)
def test_models_refused(active: Callable[..., Any], how: str, said: str) -> None:
    found = active(refused, {}, {}, how)
    assert said in found, found
    assert ";" in found and "\n" not in found


def checked(given: dict[str, Any], fields: dict[str, Any]) -> str:
    """What a strategy says to a model's configuration."""
    import torch

    from nxdt_nemo.errors import ConfigError
    from nxdt_nemo.lightning import NeuronMegatronStrategy

    strategy = NeuronMegatronStrategy(**given)
    try:
        plain = {"params_dtype": torch.float32, "bf16": False, "fp16": False, "calculate_per_token_loss": False}
        strategy.check(SimpleNamespace(**strategy.layout | plain | fields))
    except ConfigError as error:
        return str(error)
    return ""


def test_stages_send_the_models_dtype(active: Callable[..., Any]) -> None:
    import torch

    half, stages = {"params_dtype": torch.bfloat16, "bf16": True}, {"pipeline_model_parallel_size": 2}
    assert active(checked, {}, half) == ""
    assert active(checked, stages | {"pipeline_dtype": torch.bfloat16}, half) == ""
    assert "pipeline_dtype: torch.float32, and the model's" in active(checked, stages, half)


def test_half_precision_says_which(active: Callable[..., Any]) -> None:
    import torch

    assert "fp16: True, and no loss is scaled here; use bf16=True" in active(checked, {}, {"fp16": True})
    for dtype, fix in ((torch.bfloat16, "add bf16=True"), (torch.float16, "leave it out")):
        found = active(checked, {}, {"params_dtype": dtype})
        assert f"params_dtype: {dtype} without bf16=True; {fix}" in found


def parts(rows: int, size: int | None) -> Any:
    """(the samples of each micro-batch of a batch, the loss of the tutorial's model on it)."""
    import torch
    from lightning.pytorch import Trainer

    from nxdt_nemo.lightning import NeuronMegatronStrategy
    from nxdt_nemo.testing.ours import forget_groups

    class Model(script().SmallGPT):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch = {name: tensor[:rows] for name, tensor in batch.items()}
            sizes = [len(part["tokens"]) for part in self.trainer.strategy.micro_batches(batch)]
            loss = super().training_step(batch, batch_idx)
            found.append((sizes, loss.item()))
            return loss

    found: list[Any] = []
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = NeuronMegatronStrategy(micro_batch_size=size)
    Trainer(accelerator="neuron", devices=1, strategy=strategy, max_steps=1, **quiet).fit(Model())
    forget_groups()
    return found[0]


def test_a_smaller_last_batch_goes_through_in_equal_parts(active: Callable[..., Any]) -> None:
    """Whose mean loss is that of the rows."""
    for rows, size, sizes in ((3, 2, [1] * 3), (6, 4, [2] * 3), (1, 2, [1])):
        found, loss = active(parts, rows, size)
        whole, expected = active(parts, rows, None)
        assert (found, whole) == (sizes, [rows])
        assert loss == pytest.approx(expected, rel=1e-6)


def unsuitable(batch: Any) -> str:
    from nxdt_nemo.errors import ConfigError
    from nxdt_nemo.lightning import NeuronMegatronStrategy

    try:
        NeuronMegatronStrategy().micro_batches(batch)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("batch", [[1, 2], {}, {"tokens": [1, 2]}])
def test_a_batch_is_a_dict_of_tensors(active: Callable[..., Any], batch: Any) -> None:
    found = active(unsuitable, batch)
    assert f"a batch is no dict of tensors: {type(batch).__name__}; have" in found


def fitted_twice(ddp: dict[str, Any], sharded: bool) -> list[float]:
    """The first and last loss of two runs of one model by two Trainers, and the second run's steps."""
    from lightning.pytorch import Trainer

    from nxdt_nemo.lightning import NeuronMegatronStrategy
    from nxdt_nemo.testing.ours import forget_groups

    gpt, found = script(), []
    model = gpt.SmallGPT()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 4}
    try:
        for _ in range(2):
            strategy = NeuronMegatronStrategy(micro_batch_size=2, distributed_optimizer=sharded, ddp=ddp)
            trainer = Trainer(accelerator="neuron", devices=1, strategy=strategy, **quiet)
            trainer.fit(model)
            found.append(trainer.callback_metrics["train_loss"].item())
            trainer.validate(model, model.train_dataloader(), verbose=False)
            found.append(trainer.callback_metrics["val_loss"].item())
    finally:
        forget_groups()
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_model_is_fitted_again(active: Callable[..., Any], sharded: bool) -> None:
    """Also with hooks: an earlier wrapper's would reduce its own buffers."""
    hooks = {"overlap_grad_reduce": True} | ({"overlap_param_gather": True} if sharded else {})
    plain = active(fitted_twice, {}, sharded)
    assert active(fitted_twice, hooks, sharded) == pytest.approx(plain, rel=1e-6)
    assert plain[3] < plain[1], "the second run learned nothing"


def test_gradients_are_reduced_beside_micro_batches(active: Callable[..., Any]) -> None:
    """Once a step: megatron-core would fail at the second micro-batch."""
    assert active(refused, {"micro_batch_size": 2, "ddp": {"overlap_grad_reduce": True}}, {}) == ""


# --- in layouts, as a user runs it ---------------------------------------------------------------------

LAYOUTS = {
    "tp2": "--devices 2 --tensor_model_parallel_size 2",
    "tp2sp": "--devices 2 --tensor_model_parallel_size 2 --sequence_parallel",
    "pp2": "--devices 2 --pipeline_model_parallel_size 2",
    "vpp2": "--devices 2 --pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2",
    "cp2": "--devices 2 --context_parallel_size 2",
    "dp2": "--devices 2",
    "dp2zero": "--devices 2 --distributed_optimizer",
    "tp2dp2zero": "--devices 4 --tensor_model_parallel_size 2 --sequence_parallel --distributed_optimizer",
}
FIRST, LAST = 3, 9


def losses(folder: Path, steps: int, words: str = "") -> list[float]:
    done = run(SCRIPT, ["--folder", str(folder), "--steps", str(steps), *words.split()], folder, cwd=folder.parent)
    assert done.code == 0, done.output[-3000:]
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
def test_every_layout_goes_on_as_one_rank(tmp_path: Path) -> None:
    """Also the other way: what two ranks saved, one rank takes up."""
    base = tmp_path / "base"
    first = losses(base, FIRST)
    assert len(first) == FIRST
    shutil.copytree(base, tmp_path / "one")
    one = losses(tmp_path / "one", LAST)
    assert len(one) == LAST - FIRST
    assert abs(one[0] - one[-1]) > 0.1, "a run that learned nothing would agree with any other"
    for name, words in LAYOUTS.items():
        shutil.copytree(base, tmp_path / name)
        found = losses(tmp_path / name, LAST, words)
        assert found == pytest.approx(one, rel=1e-6), name
    longer = losses(tmp_path / "one", LAST + 2)
    for name in ("pp2", "tp2dp2zero"):
        assert losses(tmp_path / name, LAST + 2) == pytest.approx(longer, rel=1e-6), name


@pytest.mark.slow
def test_two_ranks_go_on_to_the_bit(tmp_path: Path) -> None:
    words = f"{LAYOUTS['tp2dp2zero']}"
    whole = losses(tmp_path / "whole", LAST, words)
    assert losses(tmp_path / "halves", 6, words) == whole[:6]
    assert losses(tmp_path / "halves", LAST, words) == whole[6:]


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run(SCRIPT, ["--tensor_model_parallel_size", "3", "--devices", "2"], tmp_path, cwd=tmp_path)
    assert done.code == 2
    assert "Trainer.devices: 2 ranks are not divided by 3 x 1 x 1" in done.output
    assert "Traceback" not in done.output
