"""`nxdt-nemo compile`: a later start meets no graph that the cache has not; Neuron's compiler wants a device."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nxdt_nemo._resources import folder
from nxdt_nemo.audit.compile.short_run import read_counts
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


def on_the_xla_lane(test):
    return pytest.mark.slow(pytest.mark.timeout(1800)(pytest.mark.usefixtures("with_torch_xla")(test)))


def words(tmp_path: Path) -> list[str]:
    """Overrides of a tiny job."""
    corpus = write_corpus(tmp_path / "corpus")
    return [word for word in tiny(corpus, tmp_path / "unused") if not word.startswith("--")]


@pytest.fixture
def started(ours):
    """started(*arguments, **environment) is what `nxdt-nemo` prints on the xla lane."""

    def run(*arguments: str, **environment: str) -> str:
        done = ours(*arguments, timeout=900, **{"NXDT_NEMO_RUNTIME": "xla", **environment})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def compiled(started, tmp_path):
    """compiled(*overrides) is the counts of `nxdt-nemo compile`, into a cache in tmp_path."""
    config, cache = folder("configs") / "demo_llama.yaml", tmp_path / "cache"

    def run(*overrides: str) -> dict[str, int]:
        options = ["--script", str(SCRIPT), "--cache", str(cache), "--json"]
        return json.loads(started("compile", str(config), *overrides, *options))

    return run


@on_the_xla_lane
def test_a_second_start_misses_nothing(compiled, tmp_path):
    job = words(tmp_path)
    first, second = compiled(*job), compiled(*job)
    assert first["graphs"] == first["missed"] > 1
    assert (second["graphs"], second["missed"]) == (first["graphs"], 0)
    assert compiled(*job, "model.hidden_size=64")["missed"] > 1  # the counter can count
    assert [entry.name for entry in (tmp_path / "unused").iterdir()] == ["index"]  # the data's
    assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("events*"))


@on_the_xla_lane
def test_a_job_that_logs_norms_now_and_then_misses_nothing(compiled, started, tmp_path):
    """Norms are computed in logged steps: two kinds of step, of which the short run has to meet those that follow a
    validation as well."""
    job = [*words(tmp_path), "trainer.max_steps=9", "trainer.log_every_n_steps=4", "trainer.val_check_interval=4"]
    job += [f"+exp_manager.{key}=true" for key in ("log_gradient_norm", "log_parameter_norm")]
    compiled(*job)
    job += [f"exp_manager.create_{key}=false" for key in ("checkpoint_callback", "tensorboard_logger")]
    config = [f"--config-path={folder('configs')}", "--config-name=demo_llama"]
    environ = {"XLA_PERSISTENT_CACHE_PATH": str(tmp_path / "cache"), "NXDT_NEMO_COMPILE_REPORT": str(tmp_path)}
    started("run", str(SCRIPT), *config, *job, **environ)
    found = read_counts(tmp_path)
    assert found.graphs > 1 and found.missed == 0
