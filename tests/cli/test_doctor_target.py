"""`nxdt-nemo doctor --target`, `compile` and `launch` as a user types them, in this process: they load no torch."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from nxdt_nemo._resources import folder
from nxdt_nemo.cli.app import app
from nxdt_nemo.errors import UserError

CONF = """
name: tiny
trainer: {accelerator: neuron, precision: bf16, devices: 64, num_nodes: 1}
exp_manager: {exp_dir: /shared}
model: {megatron_amp_O2: true}
neuron: {exec_timeout: 900}
"""


@pytest.fixture
def conf(tmp_path):
    (tmp_path / "conf.yaml").write_text(CONF)
    return str(tmp_path / "conf.yaml")


def said(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_target_and_its_modes():
    found = json.loads(said("doctor", "--target", "trn2.48xlarge", "--json"))
    ranks = {row["what"]: row["rank"] for row in found["target"]}
    assert ranks["memory"] == "24 GiB"
    assert ranks["peak bfloat16"] == "166.8 TFLOP/s"
    rounding = {row["by"]: row["value"] for row in found["environment"] if "STOCHASTIC" in row["variable"]}
    assert rounding == {
        "precision bf16SR": "1",
        "precision mixed_precision": "0",
        "precision mixed_precision_SR": "1",
        "precision autocast": "0",
    }
    assert all(row["reason"] and row["source"] for row in found["environment"])


def test_a_configuration_on_a_target(conf):
    found = json.loads(said("doctor", "--target", "trn2.48xlarge", "--json", conf, "+neuron.lnc=1"))
    values = {row["variable"]: (row["value"], row["by"]) for row in found["environment"]}
    assert values["NEURON_RT_EXEC_TIMEOUT"] == ("900", "neuron.exec_timeout")
    assert values["NEURON_LOGICAL_NC_CONFIG"] == ("1", "neuron.lnc")
    assert next(row["instance"] for row in found["target"] if row["what"] == "ranks") == "128 at LNC 1"


def test_the_cores_of_a_rank_are_those_of_the_target(conf):
    """The configuration names no instance."""
    found = json.loads(said("doctor", "--target", "trn2.48xlarge", "--json", conf, "trainer.devices=128"))
    assert next(row["instance"] for row in found["target"] if row["what"] == "ranks") == "128 at LNC 1"


NODES = [  # words after the target, how many nodes are printed
    ([], 2),
    (["--nodes", "3"], 3),
    (["CONF"], 1),
    (["CONF", "trainer.num_nodes=4"], 4),
    (["CONF", "trainer.num_nodes=4", "--nodes", "1"], 1),
]


@pytest.mark.parametrize("words, nodes", NODES)
def test_the_nodes_are_those_of_the_job(conf, words, nodes):
    words = ["doctor", "--target", "trn2.48xlarge", *(word.replace("CONF", conf) for word in words)]
    names = {row["variable"] for row in json.loads(said(*words, "--json"))["environment"]}
    assert ("FI_PROVIDER" in names) is (nodes > 1)
    count = f"{nodes} of them" if nodes > 1 else "one"
    assert said(*words).startswith(f"trn2.48xlarge, {count}, xla lane, Neuron SDK 2.29.")


def test_one_node_without_efa_is_all():
    text = said("doctor", "--target", "trn1.2xlarge")
    assert text.startswith("trn1.2xlarge, one, ")
    assert "FI_PROVIDER" not in text
    assert "| NEURON_PARALLEL_COMPILE_MAX_RETRIES" in text


LANES = [  # neuron.runtime, the first line, variables that are there and that are not
    ("neuron", "neuron lane, Neuron SDK 2.33.", "NEURON_RT_EXEC_TIMEOUT", "XLA_DISABLE_FUNCTIONALIZATION"),
    ("cpu", "cpu lane, Neuron SDK 2.29.", "CUDA_DEVICE_MAX_CONNECTIONS", "NEURON_CC_FLAGS"),
    ("auto", "xla lane, Neuron SDK 2.29.", "XLA_DISABLE_FUNCTIONALIZATION", "NO_SUCH"),
]


@pytest.mark.parametrize("lane, first, there, absent", LANES)
def test_the_lane_is_the_jobs(conf, lane, first, there, absent):
    text = said("doctor", "--target", "trn2.48xlarge", conf, f"+neuron.runtime={lane}")
    assert first in text.splitlines()[0]
    assert f"| {there} " in text
    assert f"| {absent} " not in text


def test_a_launchers_variable_says_whose_it_is():
    found = json.loads(said("doctor", "--target", "trn2.48xlarge", "--json"))["environment"]
    when = {row["variable"]: row["when"] for row in found}
    assert when["NEMO_EXPM_VERSION"] == "launch (slurm and parallelcluster)"
    assert when["CCOM_SOCKET_IFNAME"] == "nodes (eks)"
    assert when["NXDT_NEMO"] == "launch"


def test_the_table_is_markdown():
    text = said("doctor", "--target", "trn1.32xlarge")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows if "NEURON_RT_EXEC_TIMEOUT" in line} == {5}
    assert "NEURON_LOGICAL_NC_CONFIG" not in text


WRONG = [  # words, the line
    (["doctor", "--target", "trn2.48xl"], "--target: trn2.48xl is not a known instance; did you mean trn2.48xlarge?"),
    (["doctor", "CONF"], "nxdt-nemo doctor: CONF needs --target; name an instance type"),
    (["doctor", "--sdk", "2.29"], "nxdt-nemo doctor: --sdk 2.29 needs --target; name an instance type"),
    (["doctor", "--nodes", "2"], "nxdt-nemo doctor: --nodes 2 needs --target; name an instance type"),
    (["doctor", "--target", "trn2.48xlarge", "--sdk", "1.0"], "the xla lane needs the Neuron SDK 2.27 to 2.29, not "
     "1.0; name one of them: neuron.sdk, --sdk"),
    (["doctor", "--target", "trn1.2xlarge", "--nodes", "4"], "4 nodes of trn1.2xlarge, which has no EFA; use one "
     "node"),
    (["doctor", "--target", "trn2.3xlarge", "CONF"], "conf.yaml: trainer.devices=64, and a trn2.3xlarge has 8; use 4 "
     "or 8"),
    (["doctor", "--target", "trn2.48xlarge", "CONF", "trainer.devices=128", "+neuron.lnc=2"], "conf.yaml: "
     "trainer.devices=128, and a trn2.48xlarge has 64 at neuron.lnc=2; set neuron.lnc=1"),
    (["doctor", "--target", "trn2.48xlarge", "CONF", "trainer.num_nodes=two"], "conf.yaml: trainer.num_nodes=two is "
     "not a whole number"),
    (["doctor", "--target", "trn2.48xlarge", "CONF", "trainer=3"], "conf.yaml: trainer is not a section; write "
     "trainer: and its keys below it"),
    (["doctor", "--target", "trn1.32xlarge", "CONF", "trainer.devices=32", "+neuron.lnc=2"], "conf.yaml: neuron.lnc=2 "
     "on trn1.32xlarge; Trainium has LNC 1"),
    (["doctor", "--target", "trn2.48xlarge", "CONF", "+neuron.compiler_flags=O1"], "conf.yaml: neuron.compiler_flags: "
     "NEURON_CC_FLAGS=O1 is not options that begin with -"),
    (["compile"], "nxdt-nemo compile: which configuration?; name a YAML file, or use --list"),
    (["compile", "CONF", "--script", "no.py"], "--script no.py: no such script"),
    (["compile", "CONF", "--cache", "s3://b/c"], "cache: s3://b/c is not a folder; on XLA:CPU use a folder: --cache "
     "FOLDER"),
    (["compile", "--list", "--cache", "/no/cache"], "/no/cache: there is no cache; name one, or compile first"),
    (["launch", "CONF"], "conf.yaml: on which instance?; use --target trn2.48xlarge, or neuron.instance; --target cpu "
     "rehearses"),
    (["launch", "CONF", "--on", "parallelcluster", "--target", "trn2.48xlarge"], "--on parallelcluster: writes "
     "tiny.sbatch and cluster.yaml; name a folder with -o"),
    (["launch", "CONFx"], "CONFx: there is no such file; did you mean CONF?"),
    (["compile", "CONF", "trainer.num_nodes=2"], "conf.yaml: trainer.num_nodes=2: one node's graphs are not those of "
     "2, whose ranks they name; start a short run on every node (docs/trainium.md), or set trainer.num_nodes=1"),
    *((["compile", "CONF", word], f"conf.yaml: trainer.devices={told} is no number of ranks to compile for; set "
       "trainer.devices") for word, told in [
           ("trainer.devices=auto", "auto"), ("trainer.devices=-1", "-1"), ("trainer.devices=[]", "[]"),
           ("~trainer.devices", "null")]),
    (["compile", "CONF", "--cache", "CONF"], "cache CONF: File exists; name a folder to write into"),
    (["compile", "CONF", "--cache", "CONF/in"], "cache CONF/in: Not a directory; name a folder to write into"),
    (["launch", "CONF", "--target", "cpu", "-o", "CONF"], "-o CONF: File exists; name a folder to write into"),
    (["doctor", "--target", "trn2.48xlarge", "--sdk", "banana"], "--sdk banana: is no version of the SDK; write it as "
     "in 2.29"),
    (["audit", "CONF", "trainer.devices=auto"], "conf.yaml: trainer.devices=auto is no number to size a step by; set "
     "trainer.devices"),
    (["audit", "CONF", "~trainer.devices"], "conf.yaml: trainer.devices=null is no number to size a step by; set "
     "trainer.devices"),
    (["audit", "CONF", "~trainer", "--world", "8"], "conf.yaml: trainer is not a section; write trainer: and its keys "
     "below it"),
    (["audit", "CONF", "--world", "8"], "conf.yaml: model.num_layers=null is no number to size a step by; set "
     "model.num_layers"),
    (["audit", "train", "--hlo", "CONF"], "--hlo CONF: File exists; name a folder to write into"),
]  # fmt: skip


@pytest.mark.parametrize("words, line", WRONG)
def test_a_mistake_is_one_line(conf, words, line):
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, [word.replace("CONF", conf) for word in words], catch_exceptions=False)
    assert str(caught.value) == line.replace("CONF", conf)


def test_launch_prints_what_it_would_write(conf, tmp_path):
    words = ["launch", conf, "--script", "x.py", "--target", "trn2.48xlarge"]
    printed = said(*words)
    written = said(*words, "-o", str(tmp_path / "jobs"))
    file = tmp_path / "jobs" / "tiny.sh"
    assert written == f"{file}\n"
    assert file.read_text() == printed
    assert printed.startswith("#!/usr/bin/env bash\n# tiny: 1 x trn2.48xlarge, 64 ranks each.")


def test_launch_writes_over_nothing_unasked(conf, tmp_path):
    words = ["launch", conf, "--target", "trn2.48xlarge", "-o", str(tmp_path)]
    said(*words)
    said(*words)  # the same text
    file = tmp_path / "tiny.sh"
    file.write_text("edited")
    with pytest.raises(UserError, match=r"tiny\.sh: is there already; use --force to write over it"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert file.read_text() == "edited"
    said(*words, "--force")
    assert file.read_text() != "edited"


OPEN = ["validate", "launch", "audit", "compile", "compile --list", "doctor --target trn2.48xlarge"]


@pytest.mark.parametrize("command", OPEN)
def test_an_interpolation_without_its_end_is_one_line(tmp_path, command):
    file = tmp_path / "open.yaml"
    file.write_text("trainer: {devices: 1}\nmodel: {a: '${b'}\n")
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, [*command.split(), str(file)], catch_exceptions=False)
    assert str(caught.value).startswith("open.yaml: not readable as YAML: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["compile", "compile --list", "doctor --target trn2.48xlarge"])
def test_a_file_of_another_product_is_refused(tmp_path, command):
    """Its precision.type would count for nothing."""
    file = tmp_path / "theirs.yaml"
    file.write_text("model_source: hf\ndistributed_strategy: {zero1: true}\nprecision: {type: bf16SR}\nmodel: {}\n")
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, [*command.split(), str(file)], catch_exceptions=False)
    line = f"theirs.yaml: is written for neuronx-distributed-training; nxdt-nemo migrate {file} -o NEW.yaml, and take"
    assert str(caught.value) == f"{line} that"


def test_launch_takes_our_compositions():
    data = ["model.data.data_prefix=[/d/x]", "model.tokenizer.type=/d/t"]
    text = said("launch", "train", "model=llama2_7b", "target=trn2", *data)
    assert f"run --config {folder('configs') / 'train.yaml'} \\\n" in text
    assert "  model=llama2_7b \\\n  target=trn2 \\\n" in text


def test_none_of_them_loads_torch():
    assert sys.modules.get("torch_xla") is None
