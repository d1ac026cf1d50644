"""Packages kept out of a process look uninstalled to whoever asks, and are back after undo."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime import machine
from nxdt_nemo.runtime.keep_out import keep_out

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package of its own, so that the test's process keeps its torch_xla."""
    (tmp_path / "kept_out" / "inner").mkdir(parents=True)
    (tmp_path / "kept_out" / "__init__.py").write_text("")
    (tmp_path / "kept_out" / "inner" / "__init__.py").write_text("")
    info = tmp_path / "kept_out-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kept-out\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("kept_out", "kept_out.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "kept_out"


def is_there(name: str) -> list[bool]:
    """What each way of asking answers."""

    def tells(ask: Callable[..., Any], *args: str) -> bool:
        try:
            return ask(*args) is not None
        except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
            return False

    return [
        tells(importlib.util.find_spec, name),
        tells(importlib.util.find_spec, f"{name}.inner"),
        tells(importlib.metadata.version, name),
        tells(importlib.metadata.version, name.replace("_", "-").upper()),
        tells(importlib.metadata.metadata, name),
        tells(importlib.import_module, f"{name}.inner"),
        tells(importlib.import_module, name),
    ]


def test_looks_uninstalled_until_undone(package: str) -> None:
    before = list(sys.meta_path)
    undo = keep_out(package)
    assert not any(is_there(package))
    assert importlib.metadata.version("pytest"), "other packages are still found"
    assert machine.installed(package) == "1.0", "the lane's own probe is not fooled"
    undo()
    assert sys.meta_path == before
    assert package not in sys.modules
    assert all(is_there(package))
    undo()
    assert package in sys.modules, "a second undo does nothing"


def test_nested(package: str) -> None:
    outer, inner = keep_out(package), keep_out(package)
    outer()
    assert not any(is_there(package))
    inner()
    assert all(is_there(package))


def test_refuses_when_loaded(package: str) -> None:
    before = list(sys.meta_path)
    importlib.import_module(package)
    with pytest.raises(LaneError) as error:
        keep_out("never_heard_of", package)
    assert "kept_out is already loaded" in error.value.reason
    assert "before anything imports kept_out" in error.value.fix
    assert sys.meta_path == before
    assert "never_heard_of" not in sys.modules


HUGGING_FACE = """
import importlib.util, os, sys
if KEEP:
    from nxdt_nemo.runtime.cpu import CpuLane
    CpuLane().enter_process()
import accelerate, transformers
from transformers.utils import is_torch_xla_available, is_torch_neuroncore_available
from lightning.fabric.accelerators.xla import XLAAccelerator
print(sys.modules.get("torch_xla") is not None, any(name.startswith("torch_xla.") for name in sys.modules),
      accelerate.utils.is_torch_xla_available(), is_torch_xla_available(), is_torch_neuroncore_available(),
      importlib.util.find_spec("torch_xla") is not None, "PJRT_DEVICE" in os.environ, XLAAccelerator.is_available())
if KEEP:
    print(type(accelerate.Accelerator(cpu=True).device).__name__)
"""


def hugging_face(keep: bool) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PJRT")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = HUGGING_FACE.replace("KEEP", str(keep))
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_accelerate_transformers_and_lightning_do_without_it() -> None:
    for name in ("accelerate", "transformers", "lightning"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    assert hugging_face(True) == ["False"] * 8 + ["device"]


@pytest.mark.slow
def test_without_keep_out_accelerate_loads_it() -> None:
    """The control of the test above: it can fail."""
    pytest.importorskip("torch_xla", reason="torch_xla is not installed")
    found = hugging_face(False)
    assert found[0] == found[2] == found[6] == "True"
