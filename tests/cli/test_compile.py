"""`nxdt-nemo compile`: a later start meets no graph that the cache has not; Neuron's compiler wants a device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import typer

from nxdt_nemo._resources import folder
from nxdt_nemo.audit.compile.cache import Graph
from nxdt_nemo.audit.compile.short_run import read_counts
from nxdt_nemo.cli.compile import _lines, compile_graphs
from nxdt_nemo.errors import UserError
from nxdt_nemo.testing.script_run import tiny, write_corpus

SCRIPT = Path(__file__).resolve().parents[1] / "nemo" / "gpt_pretraining.py"
CONFIG = folder("configs") / "demo_llama.yaml"
SHORT = "++trainer.max_steps="
# Writes down how it was started, runs the rest of its line and reports three graphs.
WRAPPER = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
report = pathlib.Path(os.environ["NXDT_NEMO_COMPILE_REPORT"])
pathlib.Path("wrapper.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
(report / "rank-0.json").write_text('{{"graphs": 3}}')
raise SystemExit(subprocess.call(sys.argv[1:]) if "RUNS" in os.environ else 0)
"""
# A script with a configuration that trains nothing; it writes down its environment.
PROBE = """
import json, os, pathlib
import hydra

pathlib.Path("script.json").write_text(json.dumps(dict(os.environ)))

@hydra.main(version_base=None, config_path=None, config_name="none")
def main(cfg):
    print(cfg.trainer.max_steps)

main()
"""


@pytest.fixture
def wrapper(monkeypatch, tmp_path):
    """A neuron_parallel_compile on PATH; everything is started in tmp_path."""
    file = tmp_path / "bin" / "neuron_parallel_compile"
    file.parent.mkdir()
    file.write_text(WRAPPER)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)
    monkeypatch.delenv("NXDT_NEMO_RUNTIME", raising=False)
    monkeypatch.chdir(tmp_path)
    return file


def devices(monkeypatch, number):
    monkeypatch.setattr("nxdt_nemo.runtime.machine.neuron_devices", lambda: number)


def code_of(*arguments: str, **options: object) -> int:
    """The exit code of `nxdt-nemo compile` with these overrides of the demo's configuration."""
    with pytest.raises(typer.Exit) as caught:
        compile_graphs(CONFIG, [*arguments], **options)
    return caught.value.exit_code


def test_neurons_compiler_without_a_device_is_refused(monkeypatch, wrapper):
    devices(monkeypatch, 0)
    with pytest.raises(UserError) as caught:
        compile_graphs(CONFIG)
    assert str(caught.value) == (
        "nxdt-nemo compile: neuron_parallel_compile extracts graphs on a Neuron device, and this host has none; "
        "compile on an instance with Trainium"
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_a_device_neurons_compiler_starts_the_run(monkeypatch, wrapper, tmp_path, ranks):
    """neuron_parallel_compile, torchrun where there are several ranks, our command, the script and its words."""
    devices(monkeypatch, 1)
    monkeypatch.setenv("NEURON_CC_FLAGS", "--verbose info")
    words = [f"trainer.devices={ranks}", f"model.tensor_model_parallel_size={ranks}", "+neuron.instance=trn1.2xlarge"]
    words += ["+neuron.compiler_cache_url=s3://bucket/cache", "+neuron.runtime=auto"]
    assert code_of(*words, script=str(SCRIPT)) == 0
    line, environ = json.loads((tmp_path / "wrapper.json").read_text())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
    started = [sys.executable, *torchrun, "-m", "nxdt_nemo", "run", str(SCRIPT)]
    started += [f"--config-path={CONFIG.parent}", "--config-name=demo_llama", *words]
    assert line[: len(started)] == started
    short = line[len(started) :]
    assert short[0].startswith(SHORT)
    assert short[-2:] == ["++neuron.runtime=xla", "++neuron.compiler_cache_url=s3://bucket/cache"]
    assert environ["NXDT_NEMO_RUNTIME"] == "xla"
    assert environ["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/cache"
    assert environ["NEURON_PARALLEL_COMPILE_MAX_RETRIES"] == "1"
    assert environ["NEURON_CC_FLAGS"].startswith("--verbose info --")
    assert "XLA_PERSISTENT_CACHE_PATH" not in environ


def test_the_instance_is_told_by_the_host_too(monkeypatch, wrapper, tmp_path):
    devices(monkeypatch, 1)
    monkeypatch.setattr("nxdt_nemo.runtime.machine.product_name", lambda: "trn1.2xlarge")
    assert code_of() == 0
    line, environ = json.loads((tmp_path / "wrapper.json").read_text())
    assert line[line.index("run") + 1 :][:2] == ["--config", str(CONFIG)]
    assert environ["NEURON_PARALLEL_COMPILE_MAX_RETRIES"] == "1"
    assert "NEURON_COMPILE_CACHE_URL" not in environ  # Neuron's own default


@pytest.mark.usefixtures("with_torch_xla")
def test_wrapper_and_script_have_one_cache(monkeypatch, wrapper, tmp_path):
    """The option's, where the configuration names another: a run takes what its configuration says."""
    devices(monkeypatch, 1)
    monkeypatch.setenv("RUNS", "1")
    (tmp_path / "probe.py").write_text(PROBE)
    words = ["trainer.devices=1", "model.tensor_model_parallel_size=1", "+neuron.runtime=auto"]
    words += ["+neuron.compiler_cache_url=s3://bucket/other", "model.data.data_impl=mock"]
    assert code_of(*words, script="probe.py", cache="here") == 0
    seen = [json.loads((tmp_path / "wrapper.json").read_text())[1], json.loads((tmp_path / "script.json").read_text())]
    assert [environ["NEURON_COMPILE_CACHE_URL"] for environ in seen] == [str(tmp_path / "here")] * 2
    assert [environ["NXDT_NEMO_RUNTIME"] for environ in seen] == ["xla"] * 2


@pytest.mark.usefixtures("with_torch_xla")
@pytest.mark.parametrize(
    "text, code, said",
    [
        ("", 1, "the run asked for no graph: nothing.py trains nothing on the xla lane"),
        ("raise SystemExit(3)", 3, "the run ended with exit code 3: it asked for no graph"),
    ],
)
def test_a_run_without_graphs_has_failed(monkeypatch, tmp_path, capsys, text, code, said):
    monkeypatch.delenv("NXDT_NEMO_RUNTIME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.py").write_text(text)
    assert code_of("trainer.devices=1", script="nothing.py") == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"nxdt_nemo: {said}\n")


@pytest.mark.parametrize("lane", ["cpu", "neuron"])
def test_a_lane_without_graphs_is_refused(monkeypatch, lane):
    monkeypatch.setenv("NXDT_NEMO_RUNTIME", "xla")
    with pytest.raises(UserError) as caught:
        compile_graphs(CONFIG, [f"+neuron.runtime={lane}"])
    reason = "only the xla lane has graphs to compile ahead"
    assert str(caught.value) == f"demo_llama.yaml: neuron.runtime={lane}: {reason}; set neuron.runtime=xla"
    monkeypatch.setenv("NXDT_NEMO_RUNTIME", lane)
    with pytest.raises(UserError) as caught:
        compile_graphs(CONFIG)
    assert str(caught.value) == f"NXDT_NEMO_RUNTIME={lane}: {reason}; set it to xla, or leave it out"


def test_the_list_of_a_cache():
    graphs = [Graph("MODULE_1|2", "x", "compiled", 2048, 7200, "stale lock"), Graph("MODULE_3", "x", "waiting", 0, 0)]
    lines = list(_lines("here", graphs))
    assert lines[0] == "here: 2 graphs, 2.0 KiB; 1 compiled, 1 waiting"
    assert lines[4:6] == [
        "| MODULE_1\\|2 | x | compiled, stale lock | 2.0 KiB | 2.0 |",
        "| MODULE_3 | x | waiting | 0.0 KiB | 0.0 |",
    ]
    assert lines[-1].endswith("clear-locks")


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
    cache = tmp_path / "cache"

    def run(*overrides: str) -> dict[str, int]:
        options = ["--script", str(SCRIPT), "--cache", str(cache), "--json"]
        return json.loads(started("compile", str(CONFIG), *overrides, *options))

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
    config = [f"--config-path={CONFIG.parent}", "--config-name=demo_llama"]
    environ = {"XLA_PERSISTENT_CACHE_PATH": str(tmp_path / "cache"), "NXDT_NEMO_COMPILE_REPORT": str(tmp_path)}
    started("run", str(SCRIPT), *config, *job, **environ)
    found = read_counts(tmp_path)
    assert found.graphs > 1 and found.missed == 0
