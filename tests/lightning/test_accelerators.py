"""accelerator="neuron", and the names that mean it, in Lightning's own Trainer; no NeMo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.errors import ConfigError

pytestmark = pytest.mark.ranks

PLAIN = Path(__file__).with_name("plain.py")


def plain() -> Any:
    """The script's module, imported in a rank."""
    if "plain_lightning" not in sys.modules:
        spec = importlib.util.spec_from_file_location("plain_lightning", PLAIN)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["plain_lightning"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["plain_lightning"]


def ask(given: dict[str, Any]) -> dict[str, Any]:
    """What a Trainer made of these arguments, or its error. "as_list" gives devices as a YAML list is read."""
    from omegaconf import OmegaConf

    if "as_list" in given:
        given = {**given, "devices": OmegaConf.create(given["as_list"])}
        del given["as_list"]
    launched = os.environ.pop("LOCAL_WORLD_SIZE", None)  # the pool's; without it all devices of the host are there
    try:
        run = plain().trainer(**given)
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "place": getattr(error, "place", "")}
    finally:
        if launched is not None:
            os.environ["LOCAL_WORLD_SIZE"] = launched
    return {"kind": type(run.accelerator).__name__, "devices": run.num_devices, "ids": run.device_ids}


NAMES = [  # trainer.accelerator, the class that answers
    ("neuron", "NeuronAccelerator"),
    ("gpu", "NeuronAccelerator"),
    ("cuda", "NeuronAccelerator"),
    ("auto", "NeuronAccelerator"),
    ("tpu", "NeuronAccelerator"),
    ("cpu", "CPUAccelerator"),
]


@pytest.mark.parametrize("name, kind", NAMES)
def test_names(active, name, kind):
    assert active(ask, {"accelerator": name, "devices": 1}) == {"kind": kind, "devices": 1, "ids": [0]}


def test_a_plain_trainer_is_one_rank(active):
    assert active(ask, {})["devices"] == 1
    assert active(ask, {"accelerator": "auto", "devices": -1})["devices"] == os.cpu_count()


DEVICES = [  # trainer.devices, ranks; as on the command line, in YAML and in Python
    ({"devices": 1}, 1),
    ({"devices": "2"}, 2),
    ({"devices": [0, 1]}, 2),
    ({"as_list": [0, 1, 2]}, 3),
    ({"devices": "0,1"}, 2),
    ({"devices": "1,"}, 1),
    ({"devices": 32}, 32),
    ({"devices": -1}, os.cpu_count()),
    ({"devices": "auto"}, os.cpu_count()),
]


@pytest.mark.parametrize("given, count", DEVICES, ids=lambda value: str(value))
def test_devices(active, given, count):
    assert active(ask, {"accelerator": "neuron", **given})["devices"] == count


@pytest.mark.parametrize("wrong", ["two", "-2", -2, 1.5, "0,x", [0, 0], [-1], ["0"], True], ids=repr)
def test_wrong_devices_name_the_key(active, wrong):
    found = active(ask, {"accelerator": "neuron", "devices": wrong})
    assert (found["error"], found["place"]) == (ConfigError.__name__, "trainer.devices"), found
    assert "names no devices; give" in found["text"]


def trained(given: dict[str, Any], plugin: dict[str, Any] | None = None) -> dict[str, Any]:
    from lightning.pytorch.plugins.precision import MixedPrecision

    model = plain().Line()
    plugins = [MixedPrecision(**plugin)] if plugin else None
    run = plain().trainer(**given, plugins=plugins)
    try:
        run.fit(model)
    except ConfigError as error:
        return {"error": str(error)}
    return {"losses": model.losses, "dtypes": sorted(model.dtypes), "device": str(run.strategy.root_device)}


PRECISIONS = [  # Trainer's precision, what a linear layer computes in
    ("32", "torch.float32"),
    ("bf16", "torch.bfloat16"),
    ("bf16-mixed", "torch.bfloat16"),
]


@pytest.mark.parametrize("precision, dtype", PRECISIONS)
def test_a_plain_module_trains(active, precision, dtype):
    found = active(trained, {"accelerator": "neuron", "devices": 1, "precision": precision})
    assert found["dtypes"] == [dtype]
    assert found["device"] == "cpu"
    assert len(found["losses"]) == 6
    assert found["losses"][-1] < 0.7 * found["losses"][0]


def test_a_plugin_that_names_cuda_casts_all_the_same(active):
    given = {"accelerator": "gpu", "devices": 1}
    found = active(trained, given, {"precision": "bf16-mixed", "device": "cuda"})
    assert found["dtypes"] == ["torch.bfloat16"]


def test_fp16_does_not_train(active):
    found = active(trained, {"accelerator": "neuron", "devices": 1, "precision": "16-mixed"})
    assert "trainer.precision" in found["error"]
    assert "bf16" in found["error"]


def registry() -> dict[str, Any]:
    """Registering and taking back, as activation does, on Lightning's own registry."""
    import lightning.pytorch.accelerators as accelerators

    from nxdt_nemo.lightning.accelerators import NeuronAccelerator, register

    found = accelerators.AcceleratorRegistry
    before = sorted(found.available_accelerators())
    stats = NeuronAccelerator().get_device_stats("cpu")
    made = type(found.get("neuron")).__name__
    found.remove("neuron")
    without = sorted(found.available_accelerators())
    undo = register(accelerators, None)  # type: ignore[arg-type]
    undo()
    same = sorted(found.available_accelerators()) == without
    register(accelerators, None)  # type: ignore[arg-type]
    return {"before": before, "without": without, "same": same, "made": made, "stats": stats}


def test_registry(active):
    found = active(registry)
    assert found["made"] == "NeuronAccelerator"
    assert set(found["before"]) - set(found["without"]) == {"neuron"}
    assert found["same"] is True
    assert 0 < found["stats"]["allocated_bytes"] <= found["stats"]["peak_bytes"]


def moved() -> list[Any]:
    """`model.cuda()` of a LightningModule, said by NeMo and by a helper module of the user's."""
    import torch

    found: list[Any] = []
    for name in ("nemo.collections.x", "helper"):
        names: dict[str, Any] = {"__name__": name, "model": plain().Line()}
        try:
            exec("same = model.cuda() is model is model.to('cuda')", names)
        except (RuntimeError, AssertionError) as error:
            names["same"] = type(error).__name__
        found += [names["same"], str(names["model"].device)]
    return [*found, torch.cuda.is_available()]


def test_a_module_moves_to_the_lanes_device(active):
    same, device, other, stays, has_cuda = active(moved)
    assert (same, device) == (True, "cpu")
    if not has_cuda:
        assert (other, stays) in (("RuntimeError", "cpu"), ("AssertionError", "cpu"))


def test_two_devices_without_a_launcher(active, tmp_path):
    """DDP with Lightning's own launcher: both ranks end with the weights of one rank on the whole batch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NXDT_")}
    done = subprocess.run(
        [sys.executable, "-m", "nxdt_nemo", "run", str(PLAIN)],
        env=environment | {"NXDT_NEMO_RUNTIME": "cpu"}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(line.removeprefix("FOUND ")) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1], done.stdout
    assert {rank["world"] for rank in ranks} == {2}
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert done.stderr.count("means neuron here") == 1
    one = active(trained, {"accelerator": "neuron", "devices": 1})["losses"]
    two = [sum(losses) / 2 for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert two == pytest.approx(one, rel=1e-5)


def torn_down() -> str:
    """The device of a model that a Trainer is done with, and that cannot be moved to the host."""
    import torch
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from nxdt_nemo.lightning.accelerators import NeuronAccelerator

    model = LightningModule()
    model.layer = torch.nn.Linear(1, 1)
    strategy = SingleDeviceStrategy("meta", accelerator=NeuronAccelerator())
    strategy.connect(model.to("meta"))
    strategy.teardown()
    return f"{model.device} {model.layer.weight.device}"


def test_a_model_stays_where_it_is_when_a_trainer_is_done(active: Callable[..., Any]) -> None:
    assert active(torn_down) == "meta meta"
