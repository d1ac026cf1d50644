"""`nxdt-nemo compile`: a second start meets no graph that the cache has not; Neuron's compiler wants a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nxdt_nemo._resources import folder
from nxdt_nemo.cli.compile import compile_graphs
from nxdt_nemo.errors import UserError
from nxdt_nemo.testing.script_run import tiny, write_corpus

SCRIPT = Path(__file__).resolve().parents[1] / "nemo" / "gpt_pretraining.py"


def test_neurons_compiler_without_a_device_is_refused(monkeypatch, tmp_path):
    wrapper = tmp_path / "neuron_parallel_compile"
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("nxdt_nemo.runtime.machine.neuron_devices", lambda: 0)
    with pytest.raises(UserError) as caught:
        compile_graphs(folder("configs") / "demo_llama.yaml")
    assert str(caught.value) == (
        "nxdt-nemo compile: neuron_parallel_compile extracts graphs on a Neuron device, and this host has none; "
        "compile on an instance with Trainium"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("with_torch_xla")
def test_a_second_start_misses_nothing(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    words = [word for word in tiny(corpus, tmp_path / "unused") if not word.startswith("--")]

    def compiled(*more: str) -> dict[str, int]:
        config = str(folder("configs") / "demo_llama.yaml")
        options = ["--script", str(SCRIPT), "--cache", str(tmp_path / "cache"), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "nxdt_nemo", "compile", config, *words, *more, *options],
            env=os.environ | {"NXDT_NEMO_RUNTIME": "xla"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    first, second = compiled(), compiled()
    assert first["graphs"] == first["missed"] > 1
    assert (second["graphs"], second["missed"]) == (first["graphs"], 0)
    assert compiled("model.hidden_size=64")["missed"] > 1  # the counter can count
    assert [entry.name for entry in (tmp_path / "unused").iterdir()] == ["index"]  # the data's
    assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("events*"))
