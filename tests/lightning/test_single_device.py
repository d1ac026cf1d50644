"""A plain LightningModule by Trainer(accelerator="neuron", devices=1) where the device is not the host."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nxdt_nemo.testing.neuron_standin import environment
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPool

pytestmark = pytest.mark.ranks

EPOCHS, STEPS = 4, 4


def fit(folder: str, epochs: int, resume: str | None = None) -> dict[str, Any]:
    """Train, validate and save; the strategy, where layers were, graphs compiled in each step, losses by step."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from nxdt_nemo.runtime import current

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

        def training_step(self, batch: Any) -> Any:
            devices.add(self.layers[0].weight.device.type)
            loss = (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", self.layers(batch).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.02)

        def train_dataloader(self) -> Any:
            data = torch.randn(STEPS * 8, 4, generator=torch.Generator().manual_seed(1))
            return torch.utils.data.DataLoader(data, batch_size=8)

        val_dataloader = train_dataloader

    class Compiled(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if current().traced:
                from nxdt_nemo.runtime.xla.metrics import graphs_compiled

                compiled.append(graphs_compiled())

    devices: set[str] = set()
    compiled: list[int] = []
    trainer = pl.Trainer(
        accelerator="neuron",
        devices=1,
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=CSVLogger(folder, "", ""),
        callbacks=[ModelCheckpoint(folder, monitor="val_loss", save_last=True), Compiled()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plain(), ckpt_path=resume)
    with (Path(folder) / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    return {
        "strategy": type(trainer.strategy).__name__,
        "devices": devices,
        "graphs": [after - before for before, after in itertools.pairwise(compiled)],
        "losses": losses,
    }


def check(on_the_lane: Callable[..., Any], device: str, active: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """It trains on the device as on the host, goes on from its checkpoint, and both lanes read that; what it did."""
    for name in ("cpu", "whole", "half", "rest", "host"):
        (folder / name).mkdir()
    expected = active(fit, str(folder / "cpu"), EPOCHS)
    found = on_the_lane(fit, str(folder / "whole"), EPOCHS)
    assert (expected["strategy"], expected["devices"]) == ("SingleDeviceStrategy", {"cpu"})
    assert (found["strategy"], found["devices"]) == ("NeuronSingleDeviceStrategy", {device})
    assert len(found["losses"]) == EPOCHS * STEPS and found["losses"][-1] < 0.7 * found["losses"][0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    on_the_lane(fit, str(folder / "half"), EPOCHS // 2)
    last = str(folder / "half" / "last.ckpt")
    rest = [lane(fit, str(folder / name), EPOCHS, last) for lane, name in ((on_the_lane, "rest"), (active, "host"))]
    assert rest[0]["losses"] == found["losses"][EPOCHS // 2 * STEPS :]
    assert rest[1]["losses"] == pytest.approx(rest[0]["losses"], rel=1e-5)
    saved = torch.load(last, weights_only=False)
    tensors = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) > 20 and {tensor.device.type for tensor in tensors} == {"cpu"}
    assert saved["state_dict"]._metadata["layers.1"] == {"version": 2}
    return found


@pytest.mark.slow
def test_on_the_xla_lane(on_xla: Callable[..., Any], active: Callable[..., Any], tmp_path: Path) -> None:
    found = check(on_xla, "xla", active, tmp_path)
    compiling = {step for step, graphs in enumerate(found["graphs"], 1) if graphs}
    between = {STEPS, 2 * STEPS}  # after the first validation, and after the callback's first comparison of two
    assert compiling <= {1} | between, "a step is one graph, the same one in all epochs"


@pytest.mark.slow
def test_on_the_neuron_lane(neuron_standin: Path, active: Callable[..., Any], tmp_path: Path) -> None:
    env = environment(neuron_standin) | {"NXDT_NEMO": "0"}
    with RankPool(1, env=env, init=ACTIVE, group=False) as pool:
        check(lambda function, *args: pool.run(function, *args)[0], "neuron", active, tmp_path)


def ask(given: dict[str, Any]) -> str:
    """The strategy of a Trainer with these arguments where devices are XLA's, or its error."""
    import lightning.pytorch as pl

    from nxdt_nemo.errors import ConfigError
    from nxdt_nemo.lightning import NeuronAccelerator

    devices = [torch.device("xla", index) for index in range(given["devices"])]
    with mock.patch.object(NeuronAccelerator, "get_parallel_devices", return_value=devices):
        try:
            strategy = pl.Trainer(accelerator="gpu", logger=False, **given).strategy
        except ConfigError as error:
            return str(error)
    return f"{type(strategy).__name__} on {strategy.root_device}"


def test_one_device_has_a_strategy_of_its_own(active: Callable[..., Any]) -> None:
    assert active(ask, {"devices": 1}) == "NeuronSingleDeviceStrategy on xla:0"


REFUSED = [  # Trainer's arguments, the strategy of Lightning's that would run
    ({"devices": 2}, "DDPStrategy"),
    ({"devices": 1, "num_nodes": 2}, "DDPStrategy"),
    ({"devices": 1, "strategy": "ddp"}, "DDPStrategy"),
    ({"devices": 1, "strategy": "single_device"}, "SingleDeviceStrategy"),
]


@pytest.mark.parametrize("given, strategy", REFUSED)
def test_lightnings_own_strategies_are_refused(
    active: Callable[..., Any], given: dict[str, Any], strategy: str
) -> None:
    reason = f"trainer.strategy: Lightning's {strategy} does not train on xla devices; use NeuronMegatronStrategy"
    assert active(ask, given).startswith(reason)
