"""What a script finds in its environment before its first line, by `nxdt-nemo run` and by a plain start."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from nxdt_nemo.cli.early import plain_start, script_of
from nxdt_nemo.runtime.machine import installed

SHOWN = "NEURON_CC_FLAGS NEURON_RT_EXEC_TIMEOUT NEURON_RT_STOCHASTIC_ROUNDING_EN NEURON_LOGICAL_NC_CONFIG PJRT_DEVICE"
SCRIPT = f"""
import json, os, sys
assert sys.modules.get("torch_xla") is None
print(json.dumps({{name: os.environ.get(name) for name in "{SHOWN}".split()}}), flush=True)
import hydra
@hydra.main(version_base=None, config_path=".", config_name="conf")
def main(cfg):
    pass
if __name__ == "__main__":
    main()
"""
CONF = """
trainer: {precision: bf16, devices: 128}
model: {megatron_amp_O2: true}
neuron: {runtime: xla, instance: trn2.48xlarge, exec_timeout: 600, compiler_flags: -O1}
"""
QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


@pytest.fixture
def script(tmp_path):
    (tmp_path / "conf.yaml").write_text(CONF)
    (tmp_path / "script.py").write_text(SCRIPT)


@pytest.mark.skipif(installed("torch_xla") is None, reason="the xla lane needs torch_xla")
@pytest.mark.parametrize("way", ["nxdt-nemo run", "plain"])
def test_the_environment_is_there_before_the_script_starts(start, ours, script, way):
    overrides = (*QUIET, "neuron.exec_timeout=700")
    environment = {"NEURON_CC_FLAGS": "--verbose info", "NXDT_NEMO_RUNTIME": "cpu"}
    if way == "plain":
        done = start("-u", "script.py", *overrides, NXDT_NEMO="1", **environment)
    else:
        done = ours("run", "script.py", *overrides, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "NEURON_CC_FLAGS": "--verbose info -O1 --model-type transformer --distribution-strategy llm-training "
        "--auto-cast none --enable-mixed-precision-accumulation --logical-nc-config 1",
        "NEURON_RT_EXEC_TIMEOUT": "700",
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "0",
        "NEURON_LOGICAL_NC_CONFIG": "1",
        "PJRT_DEVICE": "CPU",
    }


NO_YAML = SCRIPT.split("import hydra")[0]


@pytest.mark.skipif(installed("torch_xla") is None, reason="the xla lane needs torch_xla")
@pytest.mark.parametrize("way", ["nxdt-nemo run", "plain"])
def test_a_script_without_a_configuration_gets_what_needs_none(start, ours, tmp_path, way):
    (tmp_path / "nemo2.py").write_text(NO_YAML)
    environment = {"NXDT_NEMO_RUNTIME": "xla", "NEURON_RT_EXEC_TIMEOUT": "7"}
    plain = way == "plain"
    done = start("nemo2.py", NXDT_NEMO="1", **environment) if plain else ours("run", "nemo2.py", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "NEURON_CC_FLAGS": "--model-type transformer --distribution-strategy llm-training --auto-cast none",
        "NEURON_RT_EXEC_TIMEOUT": "7",
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": None,
        "NEURON_LOGICAL_NC_CONFIG": None,
        "PJRT_DEVICE": "CPU",
    }


RANKS = [  # what is exported; the runtime's LNC and the compiler's
    ({}, None),
    ({"LOCAL_WORLD_SIZE": "64"}, "2"),
    ({"LOCAL_WORLD_SIZE": "128"}, "1"),
    ({"NEURON_LOGICAL_NC_CONFIG": "1"}, "1"),
]


@pytest.mark.skipif(installed("torch_xla") is None, reason="the xla lane needs torch_xla")
@pytest.mark.parametrize("exported, lnc", RANKS)
def test_the_lnc_of_a_script_without_a_configuration(monkeypatch, tmp_path, exported, lnc):
    (tmp_path / "nemo2.py").write_text(NO_YAML)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    environ = kept | {"NXDT_NEMO_RUNTIME": "xla"} | exported
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr("nxdt_nemo.runtime.machine.product_name", lambda: "trn2.48xlarge")
    plain_start([sys.executable, str(tmp_path / "nemo2.py")])
    assert environ.get("NEURON_LOGICAL_NC_CONFIG") == lnc
    assert re.findall(r"--logical-nc-config (\d)", environ["NEURON_CC_FLAGS"]) == ([lnc] if lnc else [])


def test_a_plain_start_without_a_configuration_sets_nothing_on_the_cpu_lane(start, tmp_path):
    (tmp_path / "nemo2.py").write_text(NO_YAML)
    done = start("nemo2.py", NXDT_NEMO="1")
    assert set(json.loads(done.stdout).values()) == {None}, done.stderr


@pytest.mark.skipif(installed("torch_xla") is None, reason="the xla lane needs torch_xla")
def test_an_instance_known_by_its_hosts_name_has_a_core_for_each_rank(monkeypatch, tmp_path, script):
    environ = dict(os.environ)
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr("nxdt_nemo.runtime.machine.product_name", lambda: "trn2.48xlarge")
    plain_start([sys.executable, str(tmp_path / "script.py"), *QUIET, "~neuron.instance"])
    assert environ["NEURON_LOGICAL_NC_CONFIG"] == "1"
    assert environ["NEURON_CC_FLAGS"].endswith("--logical-nc-config 1")


@pytest.mark.parametrize("way", ["nxdt-nemo run", "plain"])
def test_the_cpu_lane_leaves_the_environment_alone(start, ours, script, way):
    overrides = (*QUIET, "neuron.runtime=cpu")
    done = start("script.py", *overrides, NXDT_NEMO="1") if way == "plain" else ours("run", "script.py", *overrides)
    found = json.loads(done.stdout)
    assert found.pop("NEURON_RT_STOCHASTIC_ROUNDING_EN") == "0"
    assert set(found.values()) == {None}, done.stderr


def test_a_contradiction_stops_the_run(ours, script):
    done = ours("run", "script.py", *QUIET, "+neuron.precision=fp32")
    assert done.returncode == 2
    assert (
        "conf.yaml: neuron.precision=fp32 contradicts trainer.precision=bf16; use trainer.precision=32" in done.stderr
    )


def test_a_mistake_in_a_plain_start_is_the_scripts(start, script):
    """The early look says nothing: hydra names the override when the script asks it."""
    done = start("script.py", "no.such.key=1", NXDT_NEMO="1", NXDT_NEMO_RUNTIME="cpu")
    assert done.returncode == 1
    assert done.stderr.count("Could not override") == 1


WORDS = [  # what follows python; the script and its arguments
    ("script.py a b", ("script.py", ["a", "b"])),
    ("-u -X dev -W ignore script.py -c x", ("script.py", ["-c", "x"])),
    ("-Xdev -OO script.py", ("script.py", [])),
    ("-c pass script.py", (None, [])),
    ("-m script", (None, [])),
    ("-um script", (None, [])),
    ("bin/nemo llm pretrain", ("bin/nemo", ["llm", "pretrain"])),
    ("bin/torchrun script.py", (None, [])),
    ("absent.py", (None, [])),
    ("", (None, [])),
]


@pytest.mark.parametrize("line, expected", WORDS)
def test_the_script_of_a_command_line(tmp_path, monkeypatch, line, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for file in ("script.py", "bin/nemo", "bin/torchrun"):
        (tmp_path / file).touch()
    script, arguments = script_of([sys.executable, *line.split()])
    assert (str(script) if script else None, list(arguments)) == expected
