"""Choosing a lane: what auto takes, what an explicit wish is told, once a process, once on rank 0."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nxdt_nemo import console
from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime import machine, xla
from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.lane import Verdict
from nxdt_nemo.runtime.neuron import package
from nxdt_nemo.runtime.select import VARIABLE, current, forget, select

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(console, "_said", set())
    forget()
    yield
    forget()


def has(monkeypatch: pytest.MonkeyPatch, devices: int = 0, native: bool = True, **versions: str) -> None:
    """This machine has these packages and as many Neuron devices; torch_neuronx is TorchNeuron."""
    for module in (xla.lane, package):
        monkeypatch.setattr(module, "installed", lambda name, *_: versions.get(name))
        monkeypatch.setattr(module, "neuron_devices", lambda: devices)
    monkeypatch.setattr(package, "registers_itself", lambda: native)


AUTO = [  # devices, packages, the reason that is printed
    (0, {"torch": "2.9.0", "torch_xla": "2.9.0"}, "neuron: needs torch>=2.10, found 2.9.0; xla: no Neuron device"),
    (0, {"torch": "2.9.0+cu128"}, "neuron: needs torch>=2.10, found 2.9.0; xla: torch_xla is not installed"),
    (2, {"torch": "2.10.0"}, "neuron: torch_neuronx is not installed; xla: torch_xla is not installed"),
    (0, {"torch": "2.14.0", "torch_neuronx": "2.14.3.0"}, "neuron: no Neuron device; xla: torch_xla is not installed"),
    (
        2,
        {"torch": "2.13.0", "torch_neuronx": "2.14.3.0"},
        "neuron: torch_neuronx 2.14.3.0 is for torch 2.14, found 2.13.0; xla: torch_xla is not installed",
    ),
    (
        2,
        {"torch": "2.9.0", "torch_xla": "2.9.0", "libneuronxla": "2"},
        "neuron: needs torch>=2.10, found 2.9.0; xla: has to be asked for",
    ),
]


@pytest.mark.parametrize(("devices", "packages", "reason"), AUTO)
def test_auto_takes_cpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch, devices: int, packages: dict[str, str], reason: str
) -> None:
    has(monkeypatch, devices, **packages)
    lane, said = select()
    assert (lane.name, said) == ("cpu", reason)


def test_auto_takes_torchneuron(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    has(monkeypatch, 2, torch="2.14.0", torch_neuronx="2.14.3.0.1")
    assert current().name == "neuron"
    said = "TorchNeuron 2.14.3.0.1, on which nobody has tried it; xla: torch_xla is not installed"
    assert capsys.readouterr().err == f"nxdt_nemo: lane neuron ({said})\n"


def test_the_library_on_torch_xla_is_not_torchneuron(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 2, native=False, torch="2.10.0", torch_neuronx="2.9.0.2.11")
    lane, reason = select()
    assert lane.name == "cpu"
    assert reason.startswith("neuron: torch_neuronx 2.9.0.2.11 is the library on torch-xla, not TorchNeuron")


def test_torchneuron_tells_itself_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "torch_neuronx-2.14.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-neuronx\nVersion: 2.14.3.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not package.registers_itself()
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_neuronx = torch_neuronx:_autoload\n")
    assert package.registers_itself()


def test_auto_takes_the_best_that_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla.XlaLane, "probe", classmethod(lambda cls, *, asked=False: Verdict(True, "there")))
    has(monkeypatch, 0, torch="2.9.0")
    lane, reason = select()
    assert (lane.name, reason) == ("xla", "there; neuron: needs torch>=2.10, found 2.9.0")


ASKED = [  # lane, packages, what the one line says
    ("xla", {}, ["torch_xla is not installed: pip install 'nxdt-nemo[xla]'"]),
    ("neuron", {"torch": "2.9.0"}, ["needs torch>=2.10, found 2.9.0", "torch_neuronx is not installed: "]),
    ("neuron", {"torch": "2.14.0"}, ["TorchNeuron comes with the AWS Neuron SDK", "no Neuron device"]),
    ("tpu", {}, ["'tpu' is not a lane", "use auto, cpu, xla or neuron"]),
    ("CPU", {}, ["'CPU' is not a lane"]),
]


@pytest.mark.parametrize(("name", "packages", "parts"), ASKED)
def test_a_wish_that_cannot_be_met_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, packages: dict[str, str], parts: list[str]
) -> None:
    has(monkeypatch, 0, **packages)
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(LaneError) as error:
        select()
    assert error.value.place == f"{VARIABLE}={name}"
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    with pytest.raises(LaneError):
        current()


def test_the_xla_lane_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0, torch="2.9.0", torch_xla="2.9.0")
    lane, reason = select("xla")
    assert (lane.name, reason) == ("xla", "asked for by runtime=xla")


def test_the_neuron_lane_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may not show in /dev: then the lane says so when it is used."""
    has(monkeypatch, 0, torch="2.14.0", torch_neuronx="2.14.3.0")
    assert select("neuron")[0].name == "neuron"


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "neuron")
    lane, reason = select("cpu")
    assert isinstance(lane, CpuLane)
    assert reason == "asked for by runtime=cpu"
    with pytest.raises(LaneError) as error:
        select("tpu")
    assert error.value.place == "runtime=tpu"


def test_once_a_process_and_announced_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    has(monkeypatch, torch="2.9.0", torch_xla="2.9.0")
    first = current()
    monkeypatch.setenv(VARIABLE, "tpu")
    assert current() is first
    line = "nxdt_nemo: lane cpu (neuron: needs torch>=2.10, found 2.9.0; xla: no Neuron device)\n"
    assert capsys.readouterr().err == line
    forget()
    with pytest.raises(LaneError):
        current()


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(VARIABLE, "cpu")
    assert current().name == "cpu"
    assert capsys.readouterr().err == ""


def test_selecting_imports_no_torch() -> None:
    program = "import sys; from nxdt_nemo.runtime import current; print(current().name, 'torch' in sys.modules)"
    env = {"PYTHONPATH": str(ROOT), VARIABLE: "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "cpu False\n"


def test_the_machine_is_read_from_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine.installed("some_package") == "0"
    info = tmp_path / "some_package-3.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 3.4\n")
    assert machine.installed("some_package") == "3.4"
    assert machine.installed("no_such_package") is None
    assert machine.neuron_devices() >= 0
