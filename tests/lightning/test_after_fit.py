"""What a script does when trainer.fit is done, on a lane whose device is not the host: the model has stayed there."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.neuron_standin import environment
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.script_run import read_tensors
from nxdt_nemo.testing.traced import TRACED_ENV

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "lightning_gpt.py"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def after_fit(folder: str) -> dict[str, Any]:
    """Of two steps of the tutorial's model, small: where its parameters are, and what was computed afterwards."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    from nxdt_nemo.lightning import NeuronMegatronStrategy
    from nxdt_nemo.testing.ours import forget_groups

    small = runpy.run_path(str(SCRIPT))["SmallGPT"]

    class Model(small):  # type: ignore[misc,valid-type]
        fields = small.fields | {"num_layers": 1, "hidden_size": 16}

        def chunk(self, *ends: Any) -> Any:
            chunk, drawn = super().chunk(*ends), torch.Generator("cpu").manual_seed(0)
            for weight in (parameter for parameter in chunk.parameters() if parameter.dim() > 1):
                weight.data.copy_(torch.randn(weight.shape, generator=drawn, device="cpu") / 10)
            return chunk

        def rows(self) -> Any:
            return DataLoader(self.train_dataloader().dataset, batch_size=8)

        val_dataloader = test_dataloader = predict_dataloader = rows

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.forward_step(self.chunks[0], batch).max()

    def trainer(steps: int) -> Any:
        return Trainer(
            accelerator="neuron",
            devices=1,
            strategy=NeuronMegatronStrategy(),
            callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)],
            max_steps=steps,
            num_sanity_val_steps=0,
            limit_val_batches=1,
            limit_test_batches=1,
            limit_predict_batches=1,
            **QUIET,
        )

    model = Model()
    try:
        first = trainer(2)
        first.fit(model)
        held = {id(param) for group in first.optimizers[0].param_groups for param in group["params"]}
        found: dict[str, Any] = {
            "devices": {parameter.device.type for parameter in model.parameters()} | {model.device.type},
            "trained": {id(parameter) for parameter in model.parameters()} == held,
            "marked": sum(hasattr(parameter, "tensor_model_parallel") for parameter in model.parameters()),
        }
        first.save_checkpoint(f"{folder}/after")
        (validated,), (tested,) = first.validate(model, verbose=False), first.test(model, verbose=False)
        (predicted,) = first.predict(model)
        found["state"] = {name: t.cpu() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        found["losses"] = [validated["val_loss"], tested["val_loss"], float(predicted)]
        second = trainer(4)
        second.fit(model)
        found["losses"].append(float(second.callback_metrics["train_loss"]))
        return found
    finally:
        forget_groups()


@pytest.fixture(scope="module")
def on_cpu(active: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = active(after_fit, str(tmp_path_factory.mktemp("cpu")))
    validated, tested, predicted, trained = found["losses"]
    assert validated == tested
    assert len({validated, predicted, trained}) == 3
    return found


def check(on_cpu: dict[str, Any], folder: Path, device: str, env: dict[str, str]) -> None:
    import torch

    with RankPool(1, init=ACTIVE, env=env, group=False, timeout=300) as pool:
        [found] = pool.run(after_fit, str(folder))
    assert found["devices"] == {device}
    assert found["trained"]
    assert found["marked"] == on_cpu["marked"] > 0
    after, last = (read_tensors(folder / name) for name in ("after", "last.ckpt"))
    assert after.keys() == last.keys() and len(after) > len(found["state"])
    assert all(torch.equal(after[name], last[name]) for name in after)
    assert found["losses"] == pytest.approx(on_cpu["losses"], rel=1e-5)


@pytest.mark.usefixtures("with_torch_xla")
def test_on_the_xla_lane(on_cpu: dict[str, Any], tmp_path: Path) -> None:
    check(on_cpu, tmp_path, "xla", TRACED_ENV)


def test_on_the_neuron_lanes_standin(on_cpu: dict[str, Any], tmp_path: Path, neuron_standin: Path) -> None:
    check(on_cpu, tmp_path, "neuron", environment(neuron_standin) | {"NXDT_NEMO": "0"})
