"""`nxdt-nemo compile`: a later start meets no graph that the cache has not; Neuron's compiler wants a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

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


TINY = (
    "trainer.devices=2",
    "trainer.num_nodes=1",
    "model.tensor_model_parallel_size=2",
    "+neuron.compiler_flags=-O1",
    "+neuron.runtime=auto",
)
WRAPPER = """#!{python}
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open({told!r}, "w"))
sys.exit({code})
"""


@pytest.fixture
def on_a_device(monkeypatch, tmp_path):
    """on_a_device(code) is what neuron_parallel_compile, which is not there, would be started with: words, environment.
    It ends with this exit code."""

    def compile_there(code: int = 0, *overrides: str) -> tuple[list[str], dict[str, str]]:
        wrapper, told = tmp_path / "neuron_parallel_compile", tmp_path / "told.json"
        wrapper.write_text(WRAPPER.format(python=sys.executable, told=str(told), code=code))
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setenv("NXDT_NEMO_RUNTIME", "cpu")
        monkeypatch.setattr("nxdt_nemo.runtime.machine.neuron_devices", lambda: 2)
        with pytest.raises(typer.Exit) as ended:
            compile_graphs(
                folder("configs") / "demo_llama.yaml",
                [*TINY, *overrides],
                script=str(SCRIPT),
                cache="s3://bucket/cache",
            )
        assert ended.value.exit_code == code
        words, environment = json.loads(told.read_text())
        return words, environment

    return compile_there


def test_neurons_compiler_stands_before_torchrun(on_a_device):
    words, environment = on_a_device()
    assert words[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert words[5:9] == ["-m", "nxdt_nemo", "run", str(SCRIPT)]
    assert set(TINY) < set(words) and words.index("++trainer.max_steps=9") > words.index(TINY[-1])
    assert words[-1] == "++neuron.runtime=xla"
    assert environment["NXDT_NEMO_RUNTIME"] == "xla"
    assert environment["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/cache"
    assert "-O1" in environment["NEURON_CC_FLAGS"].split()
    assert "XLA_PERSISTENT_CACHE_PATH" not in environment and "NEURON_PARALLEL_COMPILE_MAX_RETRIES" not in environment


def test_a_small_host_tries_a_compilation_again(on_a_device):
    _, environment = on_a_device(0, "+neuron.instance=trn1.2xlarge")
    assert environment["NEURON_PARALLEL_COMPILE_MAX_RETRIES"] == "1"


def test_the_exit_code_is_the_runs(on_a_device, capsys):
    on_a_device(3)
    assert "the run ended with exit code 3: its graphs up to there are in the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "environment", "line"),
    [
        ("neuron.runtime=cpu", "", "neuron.runtime=cpu: this lane traces no graphs; compile with neuron.runtime=xla"),
        ("neuron.runtime=neuron", "", "neuron.runtime=neuron: this lane traces no graphs; compile with"),
        ("neuron.lnc=2", "neuron", "NXDT_NEMO_RUNTIME=neuron: the neuron lane traces no graphs; set NXDT_NEMO_RUNTIME"),
    ],
)
def test_a_lane_without_graphs_is_refused(monkeypatch, tmp_path, override, environment, line):
    monkeypatch.setenv("NXDT_NEMO_RUNTIME", environment)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was started"))
    with pytest.raises(UserError) as caught:
        compile_graphs(folder("configs") / "demo_llama.yaml", [f"+{override}"], cache=str(tmp_path / "cache"))
    assert line in str(caught.value)


@pytest.mark.parametrize(("code", "ended"), [(0, "and trained nothing"), (5, "and ended with exit code 5")])
def test_a_run_without_a_graph_is_no_success(monkeypatch, tmp_path, capsys, code, ended):
    done = subprocess.CompletedProcess([], code)
    monkeypatch.setattr("nxdt_nemo.cli.compile.subprocess.run", lambda *_, **__: done)
    with pytest.raises(UserError) as caught:
        compile_graphs(folder("configs") / "demo_llama.yaml", script=str(SCRIPT), cache=str(tmp_path / "cache"))
    assert str(caught.value) == f"{SCRIPT}: the run asked for no graph {ended}; see what it said"
    assert "graphs up to there" not in capsys.readouterr().err


def test_the_list_keeps_its_columns(tmp_path, capsys):
    module = tmp_path / "cache" / "neuronxcc-2.24" / "MODULE_1+a|b"
    module.mkdir(parents=True)
    for name in ("model.neff", "model.lock"):
        (module / name).touch()
        os.utime(module / name, (0, 0))
    compile_graphs(None, cache=str(tmp_path / "cache"), listing=True)
    told = capsys.readouterr().out
    assert "1 graphs, 0.0 KiB; 1 compiled" in told
    assert "| MODULE_1+a\\|b | neuronxcc-2.24 | compiled, stale lock | 0.0 KiB |" in told
    assert "--command clear-locks" in told


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
