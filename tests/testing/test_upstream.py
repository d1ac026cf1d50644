"""The plugin `-p nxdt_nemo.testing.upstream`, on a small module that is found below megatron, as upstream's are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import importlib
import torch

def device(): return torch.zeros(1, device="cuda").device.type
def has_cuda(): return torch.cuda.is_available()
def module(name): return importlib.import_module(name)
"""
CONFTEST = "import megatron.probe\n"  # as NVIDIA's: before any test is collected
TESTS = """
import os
from unittest.mock import MagicMock, patch

import torch
from megatron import probe

def test_cuda_means_the_lane():
    assert probe.device() == "cpu" and probe.has_cuda()

def test_children_are_in_it_too():
    assert os.environ["NXDT_NEMO"] == "1" and os.environ["NXDT_NEMO_RUNTIME"] == "cpu"

def test_monkeypatch_reaches_it(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("torch.cuda.is_available", lambda: "patched")
        assert probe.has_cuda() == "patched"
    assert probe.has_cuda() is True

def test_a_mock_in_the_place_of_cuda_reaches_it():
    with patch("torch.cuda"):
        torch.cuda.is_available = MagicMock(return_value="mocked")
        assert probe.has_cuda() == "mocked"
    assert probe.has_cuda() is True and probe.device() == "cpu"

def test_a_patched_import_reaches_it():
    with patch("importlib.import_module", lambda name: f"for {name}"):
        assert probe.module("json") == "for json"
    assert probe.module("json").loads("1") == 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "probe.py").write_text(PROBE)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NXDT_", "PYTEST_"))}
    env = kept | {"PYTHONPATH": str(folder)} | variables
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False)


PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
PLUGIN = ("-p", "nxdt_nemo.testing.upstream")


def test_with_the_plugin_tests_run_through_the_backend(folder: Path) -> None:
    done = run(folder, *PYTEST, *PLUGIN)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout and "nxdt_nemo: cpu lane" in done.stdout


def test_without_it_they_do_not(folder: Path) -> None:
    done = run(folder, *PYTEST, "-k", "means_the_lane or children")
    assert "2 failed" in done.stdout and "nxdt_nemo:" not in done.stdout


def test_with_the_backend_but_no_plugin_mocks_do_not_reach_it(folder: Path) -> None:
    done = run(folder, *PYTEST, NXDT_NEMO="1", NXDT_NEMO_RUNTIME="cpu")
    assert "3 failed, 2 passed" in done.stdout, done.stdout


def test_a_lane_that_is_not_there_is_one_line(folder: Path) -> None:
    done = run(folder, *PYTEST, *PLUGIN, NXDT_NEMO_RUNTIME="neuron")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith("ERROR: nxdt-nemo: runtime=neuron") and "\n" not in done.stderr.strip()


def test_nemo_that_is_there_already_is_one_line(folder: Path) -> None:
    (folder / "early.py").write_text("import nemo\n")
    done = run(folder, *PYTEST, "-p", "early", *PLUGIN)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in done.stderr and "nemo was imported before the backend was activated" in done.stderr


def test_the_process_is_as_before(folder: Path) -> None:
    code = f"""
import os, pytest, nxdt_nemo
assert pytest.main({[*PYTEST[2:], *PLUGIN]!r}) == 0
from nxdt_nemo.patching.view import ModuleView
from megatron import probe
assert not nxdt_nemo.is_active() and "NXDT_NEMO" not in os.environ
assert "__getattribute__" not in vars(ModuleView) and not probe.has_cuda()
"""
    done = run(folder, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
