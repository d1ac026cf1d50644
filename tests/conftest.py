"""For all tests: nothing is downloaded, one thread a process, and a test that leaves a mark on the process fails."""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import nxdt_nemo
from nxdt_nemo.runtime.keep_out import keep_out
from nxdt_nemo.runtime.machine import installed
from nxdt_nemo.testing.neuron_standin import installed as installed_standin
from nxdt_nemo.testing.neuron_standin import missing_tools
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV

if TYPE_CHECKING:
    from nxdt_nemo.testing.pytest_plugin import Gloo

# accelerate would load it, and it replaces torch.distributed.new_group for all tests of this process.
keep_out("torch_xla")

pytest_plugins = ["nxdt_nemo.testing.pytest_plugin"]

# Inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOOLS = Path(__file__).parents[1] / "tools"
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


def _marks() -> dict[str, object]:
    """What a test must leave as it found it."""
    marks: dict[str, object] = {
        f"environment variable {name}": value
        for name, value in os.environ.items()
        if name.startswith("NXDT_") or name in _RANKS
    }
    marks["the working folder"] = os.getcwd()
    marks["the backend's activation"] = nxdt_nemo.is_active()
    marks["__import__"] = id(builtins.__import__)
    marks["sys.excepthook"] = id(sys.excepthook)
    distributed = sys.modules.get("torch.distributed")
    marks["torch.distributed's default group"] = bool(distributed and distributed.is_initialized())
    return marks


@pytest.fixture(autouse=True)
def _leaves_no_mark() -> Iterator[None]:
    before = _marks()
    yield
    after = _marks()
    left = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if left:
        pytest.fail(f"the test changed, and did not put back: {', '.join(left)}")


@pytest.fixture(scope="session")
def load_tool() -> Iterator[Callable[[str], ModuleType]]:
    """load_tool("keys"): tools/keys.py, which finds what lies beside it, as python does for a script."""
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_tool", TOOLS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
        loaded.append(spec.name)
        sys.path.insert(0, str(TOOLS))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(TOOLS))
        return module

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def with_torch_xla() -> None:
    """For tests whose processes import torch_xla, which is kept out of this one."""
    if installed("torch_xla") is None:
        pytest.skip("needs the extra: pip install nxdt-nemo[xla]")


@pytest.fixture(scope="session")
def neuron_standin() -> Path:
    """The folder of the neuron lane's stand-in, compiled once for each torch and kept."""
    if missing := missing_tools():
        pytest.skip(f"needs {missing} to compile a device")
    return installed_standin()


@pytest.fixture(scope="session")
def active(gloo: Gloo) -> Callable[..., Any]:
    """active(function, *args): its result, from a rank in which the backend is active; upstream is imported once."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    return lambda function, *args: gloo(1, function, *args, init=ACTIVE, env=ACTIVE_ENV)[0]
