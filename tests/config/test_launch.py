"""Launch scripts and manifests: what they are made of, and what bash does with them.

torchrun, srun and scontrol are stand-ins that write down how they were called; tests/nemo/test_nodes.py trains.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nxdt_nemo.config.environment import apply, settings
from nxdt_nemo.config.launch import files, plan
from nxdt_nemo.errors import ConfigError

CONF = """
name: Llama 3_8B
trainer: {accelerator: neuron, precision: bf16, devices: 64, num_nodes: 2}
exp_manager: {exp_dir: /shared/results, resume_if_exists: true}
model: {megatron_amp_O2: true, tensor_model_parallel_size: 2, optim: {name: fused_adam}}
neuron: {instance: trn2.48xlarge, compiler_cache_url: /shared/cache, compiler_flags: "--verbose='a b}'"}
"""
WRITES = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps({{"argv": sys.argv, "env": dict(os.environ)}}), file=file)
"""


@pytest.fixture
def conf(tmp_path):
    (tmp_path / "conf.yaml").write_text(CONF)
    return tmp_path / "conf.yaml"


def launched(conf, launcher, *overrides, **options):
    """The launch of conf.yaml, and its files."""
    given = OmegaConf.from_dotlist([override.lstrip("+") for override in overrides])
    made = plan(
        OmegaConf.merge(OmegaConf.create(CONF), given), launcher=launcher, config=conf, overrides=overrides, **options
    )
    return made, files(made)


class Shell:
    """Runs a script with stand-ins for the programs that it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        (folder / "bin").mkdir()
        self.stand_in("torchrun", WRITES)

    def stand_in(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def start(self, script: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        file = self.folder / "script"
        file.write_text(script)
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(file), *words],
            env={"PATH": path, "CALLS": str(self.calls_file), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str, **environment: str) -> tuple[int, str]:
        process = self.start(script, *words, **environment)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    @property
    def calls(self) -> list[dict[str, object]]:
        return (
            [json.loads(line) for line in self.calls_file.read_text().splitlines()] if self.calls_file.exists() else []
        )


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


SLURM = """#!/usr/bin/env bash
# A task for each node, one after the other; fails as its environment says.
shift
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_NNODES; SLURM_NODEID++)); do SLURM_NODEID=$SLURM_NODEID "$@"; done
sleep "${TAKES:-0}"
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$*" >> "$QUEUE"; fi
"""


@pytest.fixture
def slurm(shell, tmp_path):
    """slurm(script, *words, **environment): how the batch script ended, what it said, what was put back."""
    shell.stand_in("srun", SLURM)
    shell.stand_in("scontrol", SCONTROL)
    environment = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    environment["QUEUE"] = str(tmp_path / "queue")

    def run(script, *words, **more):
        code, said = shell.run(script, *words, **environment | more)
        queue = tmp_path / "queue"
        return code, said, queue.read_text().splitlines() if queue.exists() else []

    run.environment = environment
    return run


def test_a_node_of_torchrun_gets_its_command_and_the_tables_environment(conf, shell):
    made, found = launched(conf, "torchrun", script="/code/pre train.py")
    (text,) = found.values()
    code, said = shell.run(text, "a=$b c", NODE_RANK="1", MASTER_ADDR="10.0.0.1", NEURON_RT_EXEC_TIMEOUT="7")
    assert (code, said) == (0, "")
    (call,) = shell.calls
    assert call["argv"][1:] == [
        "--nnodes=2",
        "--nproc-per-node=64",
        "--node-rank=1",
        "--master-addr=10.0.0.1",
        "--master-port=29500",
        "/code/pre train.py",
        f"--config-path={conf.parent}",
        "--config-name=conf",
        "++trainer.num_nodes=2",
        "++trainer.devices=64",
        "a=$b c",
    ]
    expected = {one.name: one.value for one in settings(made.job, "process", "launch", "nodes")}
    expected |= {"NEURON_RT_EXEC_TIMEOUT": "7", "NEURON_RT_ROOT_COMM_ID": "10.0.0.1:29501", "NXDT_NEMO_RUNTIME": "xla"}
    assert {name: call["env"].get(name) for name in expected} == expected
    assert "'a b}'" in expected["NEURON_CC_FLAGS"]


def test_a_process_of_the_job_finds_its_environment_complete(conf, shell):
    """What the script exports is what a run would set: nothing is added and nothing taken."""
    made, found = launched(conf, "torchrun", script="x.py")
    shell.run(next(iter(found.values())), NODE_RANK="0", MASTER_ADDR="h")
    environ = dict(shell.calls[0]["env"])
    before = dict(environ)
    assert apply(settings(made.job), environ) == []
    assert environ == before


@pytest.mark.parametrize("missing, line", [("NODE_RANK", "number the nodes"), ("MASTER_ADDR", "address of the first")])
def test_torchrun_on_several_nodes_asks_for_what_it_needs(conf, shell, missing, line):
    _, found = launched(conf, "torchrun", script="x.py")
    given = {"NODE_RANK": "0", "MASTER_ADDR": "h"}
    code, said = shell.run(next(iter(found.values())), **{key: given[key] for key in given if key != missing})
    assert code != 0
    assert shell.calls == []
    assert line in said


def test_one_node_needs_nothing(conf, shell):
    _, found = launched(conf, "torchrun", script="x.py", nodes=1)
    code, said = shell.run(next(iter(found.values())))
    assert (code, said) == (0, "")
    assert "--master-addr=127.0.0.1" in shell.calls[0]["argv"]
    assert "FI_PROVIDER" not in shell.calls[0]["env"]


def test_slurm_starts_a_torchrun_on_each_node(conf, slurm, shell):
    _, found = launched(conf, "slurm", "+model.x=${y}", script="x.py")
    assert list(found) == ["llama-3-8b.sbatch"]
    code, _, queue = slurm(found["llama-3-8b.sbatch"], "an=override")
    assert (code, queue) == (0, [])
    assert [call["argv"][3:5] for call in shell.calls] == [
        ["--node-rank=0", "--master-addr=node-a"],
        ["--node-rank=1", "--master-addr=node-a"],
    ]
    assert all(call["argv"][-1] == "an=override" for call in shell.calls)
    assert all("+model.x=${y}" in call["argv"] for call in shell.calls)
    assert {call["env"]["NEMO_EXPM_VERSION"] for call in shell.calls} == {"77"}
    assert {call["env"]["NEURON_RT_ROOT_COMM_ID"] for call in shell.calls} == {"node-a:29501"}


ENDINGS = [  # the step's exit code, seconds that count as settled, restarts before; put back
    ("1", "0", "", ["requeue 77"]),
    ("1", "600", "", []),
    ("0", "0", "", []),
    ("1", "0", "100", []),
]


@pytest.mark.parametrize("exit_code, settled, restarts, put_back", ENDINGS)
def test_slurm_puts_a_job_back_that_failed_late(conf, slurm, exit_code, settled, restarts, put_back):
    _, found = launched(conf, "slurm", script="x.py")
    text = next(iter(found.values()))
    code, _, queue = slurm(text, CODE=exit_code, SETTLED=settled, SLURM_RESTART_COUNT=restarts)
    assert (str(code), queue) == (exit_code, put_back)


def test_slurm_puts_a_job_back_whose_time_is_up(conf, slurm, shell, tmp_path):
    _, found = launched(conf, "slurm", script="x.py")
    process = shell.start(next(iter(found.values())), **slurm.environment | {"TAKES": "4"})
    until = time.monotonic() + 30
    while len(shell.calls) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "the time is nearly up" in said
    assert (tmp_path / "queue").read_text() == "requeue 77\n"


def test_a_pod_of_eks(conf, shell):
    _, found = launched(conf, "eks", "+model.x=1", script="/code/x.py", claim="fsx", image="registry/nxdt-nemo:1")
    config, job = yaml.safe_load_all(found["llama-3-8b.yaml"])
    assert yaml.safe_load(config["data"]["conf.yaml"])["model"]["x"] == 1
    assert job["spec"]["nprocPerNode"] == "64"
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert {role: one["replicas"] for role, one in specs.items()} == {"Master": 1, "Worker": 1}
    for one in specs.values():
        pod = one["template"]["spec"]
        (container,) = pod["containers"]
        assert (container["name"], container["image"]) == ("pytorch", "registry/nxdt-nemo:1")
        assert container["resources"]["limits"]["aws.amazon.com/neuron"] == "16"
        assert container["resources"]["limits"]["vpc.amazonaws.com/efa"] == "16"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "trn2.48xlarge"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["command"] == ["bash", "/etc/nxdt-nemo/run.sh"]
    code, said = shell.run(config["data"]["run.sh"], MASTER_ADDR="llama-master-0", RANK="1")
    assert (code, said) == (0, "")
    argv = shell.calls[0]["argv"]
    assert argv[3:5] == ["--node-rank=1", "--master-addr=llama-master-0"]
    assert argv[6:] == [
        "/code/x.py",
        "--config-path=/etc/nxdt-nemo",
        "--config-name=conf",
        "++trainer.num_nodes=2",
        "++trainer.devices=64",
    ]
    assert shell.calls[0]["env"]["CCOM_SOCKET_IFNAME"] == "eth0"


def test_one_pod_of_eks_needs_no_worker_and_no_network(conf):
    _, found = launched(conf, "eks", nodes=1)
    _, job = yaml.safe_load_all(next(iter(found.values())))
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert list(specs) == ["Master"]
    (container,) = specs["Master"]["template"]["spec"]["containers"]
    assert "vpc.amazonaws.com/efa" not in container["resources"]["limits"]


def test_a_cluster(conf):
    _, found = launched(conf, "parallelcluster", script="x.py")
    assert list(found) == ["llama-3-8b.sbatch", "cluster.yaml"]
    cluster = yaml.safe_load(found["cluster.yaml"])
    (queue,) = cluster["Scheduling"]["SlurmQueues"]
    (nodes,) = queue["ComputeResources"]
    assert nodes == {
        "Name": "trn2",
        "InstanceType": "trn2.48xlarge",
        "MinCount": 0,
        "MaxCount": 2,
        "Efa": {"Enabled": True},
    }


def test_nothing_asks_for_root(conf):
    for launcher in ("torchrun", "slurm", "eks", "parallelcluster"):
        _, found = launched(conf, launcher, script="x.py")
        assert not any(word in text for text in found.values() for word in ("sudo", "privileged", "runAsUser"))


def test_without_a_script_it_is_this_packages_own(conf):
    _, found = launched(conf, "torchrun")
    assert f"-m nxdt_nemo run --config {conf} \\" in next(iter(found.values()))


def test_a_rehearsal(conf, shell):
    _, found = launched(conf, "torchrun", "trainer.devices=2", script="x.py", target="cpu", nodes=1)
    shell.run(next(iter(found.values())))
    environ = shell.calls[0]["env"]
    assert environ["NXDT_NEMO_RUNTIME"] == "cpu"
    assert not [name for name in environ if name.startswith("NEURON_") and name != "NEURON_RT_STOCHASTIC_ROUNDING_EN"]


MISTAKES = [  # overrides, options, the line
    (
        ["neuron.instance=null"],
        {},
        "on which instance?; use --target trn2.48xlarge, or neuron.instance; --target cpu rehearses",
    ),
    (
        ["trainer.devices=32"],
        {},
        "trainer.devices=32 leaves a part of each trn2.48xlarge idle, and collectives need whole nodes; use 64 or 128",
    ),
    (["trainer.devices=256"], {"nodes": 1}, "trainer.devices=256, and a trn2.48xlarge has 128; use 64 or 128"),
    (
        ["trainer.devices=128", "neuron.lnc=2"],
        {},
        "trainer.devices=128, and a trn2.48xlarge has 64 at neuron.lnc=2; set neuron.lnc=1",
    ),
    (
        ["neuron.lnc=1"],
        {},
        "trainer.devices=64 leaves a part of each trn2.48xlarge idle at neuron.lnc=1, and collectives need whole "
        "nodes; set neuron.lnc=2",
    ),
    (
        ["neuron.runtime=neuron", "trainer.devices=32", "neuron.instance=null"],
        {"target": "trn1.32xlarge"},
        "neuron.runtime=neuron on trn1.32xlarge; Trainium has the xla lane only",
    ),
    (["trainer.devices=2"], {"target": "trn1.2xlarge"}, "2 nodes of trn1.2xlarge, which has no EFA; use one node"),
    (
        ["trainer.accelerator=cpu"],
        {},
        "trainer.accelerator=cpu runs without this backend; use trainer.accelerator=neuron",
    ),
    (
        ["model.tensor_model_parallel_size=3"],
        {},
        "128 ranks are not divisible by model.tensor_model_parallel_size=3; use a multiple of 3 ranks",
    ),
]


@pytest.mark.parametrize("overrides, options, line", MISTAKES)
def test_a_mistake_is_one_line(conf, overrides, options, line):
    with pytest.raises(ConfigError) as caught:
        launched(conf, "torchrun", *overrides, **options)
    assert str(caught.value) == f"conf.yaml: {line}"


def test_folders_that_this_host_has_not_are_those_of_the_nodes(conf):
    folders = "model.data.data_prefix={train: [/d/rows], validation: [/d/held]}"
    first, second = launched(conf, "slurm", "trainer.max_steps=5", "model.data.data_impl=arrow", folders)[0].notes
    assert first.endswith("/d/rows is no folder on this host; the nodes have to have it")
    assert "/d/held" in second


def test_notes(conf):
    overrides = (
        "exp_manager.resume_if_exists=false",
        "neuron.compiler_cache_url=null",
        "+model.data.data_impl=mmap",
        "+model.data.data_prefix=[/nowhere/text]",
    )
    made, _ = launched(conf, "slurm", *overrides)
    assert len(made.notes) == 3
    text = " ".join(made.notes)
    assert all(word in text for word in ("/nowhere/text.bin", "compiler_cache_url", "resume_if_exists"))
    assert launched(conf, "slurm")[0].notes == ()
