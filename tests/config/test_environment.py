"""The environment table: its rows, the values of a job, and what is put into an environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from nxdt_nemo.config import environment
from nxdt_nemo.config.environment import apply, joined, settings, variables
from nxdt_nemo.config.instances import CHIPS, INSTANCES
from nxdt_nemo.config.job import Job, Launcher, Precision, precision_of
from nxdt_nemo.config.neuron import NeuronConfig
from nxdt_nemo.errors import ConfigError

TRN1, TRN2 = INSTANCES["trn1.32xlarge"], INSTANCES["trn2.48xlarge"]


def values(*where, **job):
    return {one.name: one.value for one in settings(Job(**job), *where)}


def options(line):
    """{option: its value} of a line of flags."""
    return {words[0].partition("=")[0]: words[1:] for words in environment._options(line)}


# The table itself


@pytest.mark.parametrize("row", variables(), ids=lambda row: row.name)
def test_each_row_is_well_formed(row):
    assert row.reason
    assert row.source
    assert row.type in get_args(environment.Kind)
    assert row.where in get_args(environment.Where)
    assert set(row.on) <= set(get_args(Launcher))
    assert set(row.lanes) <= {"cpu", "xla", "neuron"}
    assert set(row.precision) <= {*get_args(Precision), "unknown"}
    assert set(row.chip) <= set(CHIPS)
    assert set(row.instance) <= set(INSTANCES)
    for value in (row.value, *row.precision.values(), *row.chip.values(), *row.instance.values()):
        if value is not None:
            row.check(value.format(lnc=2))


def test_each_key_of_the_table_is_a_key_of_the_section():
    keys = {row.key for row in variables()} - {""}
    assert keys <= set(NeuronConfig.model_fields)


def test_a_name_stands_twice_only_for_different_sdks():
    for name in {row.name for row in variables()}:
        rows = [row for row in variables() if row.name == name]
        assert len(rows) == 1


# Values


MODES = [  # precision    rounding  --auto-cast  accumulation in float32
    ("fp32", None, ["none"], False),
    ("autocast", "0", ["none"], True),
    ("mixed_precision", "0", ["none"], True),
    ("mixed_precision_SR", "1", ["none"], True),
    ("bf16SR", "1", ["none"], True),
    ("manual", None, None, False),
    (None, None, ["none"], False),  # a script without a configuration
]


@pytest.mark.parametrize("mode, rounding, cast, accumulates", MODES)
def test_precision_modes(mode, rounding, cast, accumulates):
    found = values(precision=mode)
    flags = options(found["NEURON_CC_FLAGS"])
    assert found.get("NEURON_RT_STOCHASTIC_ROUNDING_EN") == rounding
    assert flags.get("--auto-cast") == cast
    assert ("--enable-mixed-precision-accumulation" in flags) is accumulates
    assert "XLA_USE_BF16" not in found


CORES = [  # instance, lnc key, devices; NEURON_LOGICAL_NC_CONFIG
    (TRN1, None, None, None),
    (TRN2, None, None, "2"),
    (TRN2, 1, None, "1"),
    (TRN2, None, 128, "1"),
    (TRN2, None, 64, "2"),
    (TRN2, None, 3, "2"),
    (TRN2, 2, 128, "2"),
]


@pytest.mark.parametrize("instance, key, devices, expected", CORES)
def test_runtime_and_compiler_get_the_same_lnc(instance, key, devices, expected):
    found = values(instance=instance, devices=devices, keys={"lnc": key})
    flag = options(found["NEURON_CC_FLAGS"]).get("--logical-nc-config")
    assert found.get("NEURON_LOGICAL_NC_CONFIG") == expected
    assert flag == ([expected] if expected else None)


def test_an_lnc_that_the_chip_has_not():
    with pytest.raises(ConfigError, match=r"a.yaml: neuron\.lnc=2 on trn1"):
        values(instance=TRN1, keys={"lnc": 2}, place="a.yaml")


ONE_LNC = "compiler and runtime need the same; set neuron.lnc, and neither of them by hand"
TWO_LNCS = [  # instance, keys, the line
    (TRN2, {"compiler_flags": "--logical-nc-config 1"},
     f"NEURON_CC_FLAGS has --logical-nc-config 1, and NEURON_LOGICAL_NC_CONFIG=2: {ONE_LNC}"),
    (TRN2, {"lnc": 1, "compiler_flags": "-lnc=2"},
     f"NEURON_CC_FLAGS has --logical-nc-config 2, and NEURON_LOGICAL_NC_CONFIG=1: {ONE_LNC}"),
    (TRN2, {"environment": {"NEURON_LOGICAL_NC_CONFIG": 1}},
     f"NEURON_CC_FLAGS has --logical-nc-config 2, and NEURON_LOGICAL_NC_CONFIG=1: {ONE_LNC}"),
    (TRN1, {"compiler_flags": "--lnc 2"},
     f"NEURON_CC_FLAGS has --logical-nc-config 2, and the chip has LNC 1: {ONE_LNC}"),
]  # fmt: skip


@pytest.mark.parametrize("instance, keys, line", TWO_LNCS)
def test_another_lnc_for_the_compiler_is_refused(instance, keys, line):
    with pytest.raises(ConfigError) as caught:
        values(instance=instance, keys=keys, place="a.yaml")
    assert str(caught.value) == f"a.yaml: {line}"


def test_the_same_lnc_twice_is_none():
    keys = {"compiler_flags": "--lnc 1", "environment": {"NEURON_LOGICAL_NC_CONFIG": 1}}
    assert values(instance=TRN2, devices=128, keys=keys)["NEURON_LOGICAL_NC_CONFIG"] == "1"


def check_host(job):
    job.check_lane()
    job.check_ranks()
    job.check_nodes()


THERE = [  # a job that no instance can run, the line
    ({"instance": TRN1, "lane": "neuron"},
     "neuron.runtime=neuron on trn1.32xlarge; Trainium has the xla lane only"),
    ({"lane": "neuron", "sdk": "2.29"},
     "the neuron lane needs the Neuron SDK 2.33 or later, not 2.29; name one of them: neuron.sdk, --sdk"),
    ({"sdk": "2.30.0"},
     "the xla lane needs the Neuron SDK 2.27 to 2.29, not 2.30.0; name one of them: neuron.sdk, --sdk"),
    ({"instance": TRN2, "devices": 128, "keys": {"lnc": 2}},
     "trainer.devices=128, and a trn2.48xlarge has 64 at neuron.lnc=2; set neuron.lnc=1"),
    ({"instance": TRN2, "devices": 64, "nodes": 2, "keys": {"lnc": 1}},
     "trainer.devices=64 leaves a part of each trn2.48xlarge idle at neuron.lnc=1, and collectives need whole nodes; "
     "set neuron.lnc=2"),
    ({"instance": TRN2, "devices": 256, "keys": {"lnc": 2}},
     "trainer.devices=256, and a trn2.48xlarge has 64 at neuron.lnc=2; use 64"),
]  # fmt: skip


@pytest.mark.parametrize("job, line", THERE)
def test_a_job_that_an_instance_cannot_run(job, line):
    with pytest.raises(ConfigError) as caught:
        check_host(Job(**job))
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "job", [{"lane": "neuron"}, {}, {"devices": 64, "keys": {"lnc": 1}}, {"devices": -1, "nodes": 2}]
)
def test_a_job_that_an_instance_can_run(job):
    check_host(Job(instance=TRN2, **job))


def test_each_lane_has_an_sdk_of_its_own():
    assert [Job(lane=lane).neuron_sdk for lane in ("xla", "neuron", "cpu")] == ["2.29", "2.33", "2.29"]


def test_keys_come_before_the_table():
    keys = {"exec_timeout": 600, "fuse_softmax": True, "compress_replica_groups": False, "stochastic_rounding": True}
    found = values(precision="mixed_precision", keys=keys)
    assert found["NEURON_RT_EXEC_TIMEOUT"] == "600"
    assert found["NEURON_FUSE_SOFTMAX"] == "1"
    assert found["NEURON_EXPERIMENTAL_COMPRESS_RG"] == "0"
    assert found["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "1"


def test_a_key_gives_options_before_those_of_the_table():
    found = values(precision="fp32", keys={"compiler_flags": "-O1 --auto-cast=all"})
    assert found["NEURON_CC_FLAGS"] == (
        "-O1 --auto-cast=all --model-type transformer --distribution-strategy llm-training"
    )


def test_the_sdk_chooses_the_name():
    keys = {"bucket_size_collectives": 512}
    assert values(keys=keys)["ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB"] == "512"
    old = values(keys=keys, sdk="2.20.1")
    assert old["BUCKET_CAP_MB"] == "512"
    assert "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB" not in old


def test_the_cpu_lane_gets_what_it_heeds():
    assert values(lane="cpu", precision="mixed_precision_SR") == {
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    assert values(lane="cpu", precision="fp32", instance=TRN2) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_one_node_needs_no_network():
    one, two = (values("nodes", nodes=nodes, launcher="slurm") for nodes in (1, 2))
    assert one == {}
    assert two == {
        "NEURON_RT_ROOT_COMM_ID": "$MASTER_ADDR:29501",
        "FI_PROVIDER": "efa",
        "FI_EFA_USE_DEVICE_RDMA": "1",
        "FI_EFA_FORK_SAFE": "1",
    }


def test_launchers_differ():
    slurm, eks = (values("launch", "nodes", nodes=2, launcher=name) for name in ("slurm", "eks"))
    assert slurm["NEMO_EXPM_VERSION"] == "$SLURM_JOB_ID"
    assert eks["CCOM_SOCKET_IFNAME"] == "eth0"
    assert not {"NEMO_EXPM_VERSION"} & set(eks)
    assert not {"CCOM_SOCKET_IFNAME"} & set(slurm)


def test_variables_of_the_users_own():
    keys = {"environment": {"NEURON_RT_LOG_LEVEL": "INFO", "NEURON_RT_EXEC_TIMEOUT": 5, "X": True}}
    found = values(keys=keys)
    assert (found["NEURON_RT_LOG_LEVEL"], found["NEURON_RT_EXEC_TIMEOUT"], found["X"]) == ("INFO", "5", "1")


WRONG = [  # keys, what the line says
    ({"compiler_flags": "O1"}, "neuron.compiler_flags: NEURON_CC_FLAGS=O1 is not options that begin with -"),
    (
        {"compiler_cache_url": "gs://bucket"},
        "neuron.compiler_cache_url: NEURON_COMPILE_CACHE_URL=gs://bucket is not a folder or an s3:// address",
    ),
    (
        {"compiler_flags": "--a 'b"},
        "neuron.compiler_flags: NEURON_CC_FLAGS=--a 'b has a quotation mark too many",
    ),
    ({"environment": {"A B": "1"}}, "neuron.environment: 'A B' is no name of a variable"),
    (
        {"environment": {"XLA_USE_BF16": True}},
        "neuron.environment: XLA_USE_BF16=1 turns every float32 tensor into bf16, main parameters and losses too; "
        "unset it: trainer.precision and neuron.precision choose dtypes tensor by tensor",
    ),
    (
        {"environment": {"XLA_USE_BF16": "true"}},
        "neuron.environment: XLA_USE_BF16=true turns every float32 tensor into bf16, main parameters and losses too; "
        "unset it: trainer.precision and neuron.precision choose dtypes tensor by tensor",
    ),
    (
        {"environment": {"NEURON_RT_EXEC_TIMEOUT": "soon"}},
        "neuron.environment: NEURON_RT_EXEC_TIMEOUT=soon is not a number of seconds",
    ),
]


@pytest.mark.parametrize("keys, line", WRONG)
def test_a_wrong_value_is_one_line(keys, line):
    with pytest.raises(ConfigError) as caught:
        values(keys=keys, place="a.yaml")
    assert str(caught.value) == f"a.yaml: {line}"


# NeMo's keys as a precision mode


DERIVED = [  # trainer.precision, O2, rounding, neuron.precision; mode
    (32, False, None, None, "fp32"),
    ("32-true", False, None, None, "fp32"),
    ("bf16", True, None, None, "mixed_precision"),
    ("bf16", True, True, None, "mixed_precision_SR"),
    ("bf16-mixed", False, None, None, "autocast"),
    ("bf16-mixed", False, True, None, "bf16SR"),
    ("bf16", True, None, "manual", "manual"),
    (None, False, None, "fp32", "fp32"),
    (None, False, None, None, None),
]


@pytest.mark.parametrize("trainer, o2, rounding, asked, mode", DERIVED)
def test_the_mode_of_a_config(trainer, o2, rounding, asked, mode):
    assert precision_of(trainer, o2=o2, rounding=rounding, asked=asked) == mode


def test_contradictions():
    with pytest.raises(ConfigError) as caught:
        precision_of("bf16", o2=True, rounding=None, asked="fp32")
    assert str(caught.value) == "neuron.precision=fp32 contradicts trainer.precision=bf16; use trainer.precision=32"
    with pytest.raises(ConfigError, match=r"mixed_precision contradicts trainer\.precision=32"):
        precision_of(32, o2=False, rounding=None, asked="mixed_precision")
    with pytest.raises(ConfigError, match=r"bf16SR contradicts neuron\.stochastic_rounding=False"):
        precision_of("bf16", o2=False, rounding=False, asked="bf16SR")


# What is put into an environment


LINES = [  # first, then; together
    ("", "--a 1 --b", "--a 1 --b"),
    ("--a=2", "--a 1 --b", "--a=2 --b"),
    ("-lnc 1", "--logical-nc-config 2", "-lnc 1"),
    ("--lnc=1", "--logical-nc-config 2", "--lnc=1"),
    ("-O1", "--optlevel 2 --b", "-O1 --b"),
    ("-O 1", "-O2", "-O 1"),
    ("--x='a b'", "--y", "--x='a b' --y"),
]


@pytest.mark.parametrize("first, then, together", LINES)
def test_options_together(first, then, together):
    assert joined(first, then) == together


def test_what_the_user_exported_stays():
    environ = {"NEURON_RT_EXEC_TIMEOUT": "7", "NEURON_CC_FLAGS": "--auto-cast all --verbose info"}
    assert apply(settings(Job(precision="fp32")), environ) == []
    assert environ["NEURON_RT_EXEC_TIMEOUT"] == "7"
    assert environ["NEURON_CC_FLAGS"] == (
        "--auto-cast all --verbose info --model-type transformer --distribution-strategy llm-training"
    )
    assert environ["NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"] == "3"


def test_a_quotation_that_the_user_left_open_is_not_ours_to_judge():
    environ = {"NEURON_CC_FLAGS": "--a 'b"}
    apply(settings(Job()), environ)
    assert environ["NEURON_CC_FLAGS"].startswith("--a 'b --model-type transformer")


def test_the_lnc_that_the_user_exported_is_the_compilers_too():
    environ = {"NEURON_LOGICAL_NC_CONFIG": "1"}
    assert apply(settings(Job(instance=TRN2)), environ) == []
    assert environ["NEURON_LOGICAL_NC_CONFIG"] == "1"
    assert options(environ["NEURON_CC_FLAGS"])["--logical-nc-config"] == ["1"]


def test_two_lncs_that_the_user_exported_are_told():
    environ = {"NEURON_LOGICAL_NC_CONFIG": "1", "NEURON_CC_FLAGS": "--lnc 2"}
    told = apply(settings(Job(instance=TRN2)), environ)
    assert told == [f"NEURON_CC_FLAGS has --logical-nc-config 2, and NEURON_LOGICAL_NC_CONFIG=1: {ONE_LNC}"]


def test_a_key_comes_before_what_the_user_exported():
    environ = {"NEURON_RT_EXEC_TIMEOUT": "7", "NEURON_CC_FLAGS": "-O2"}
    told = apply(settings(Job(keys={"exec_timeout": 9, "compiler_flags": "-O1"})), environ)
    assert environ["NEURON_RT_EXEC_TIMEOUT"] == "9"
    assert environ["NEURON_CC_FLAGS"].startswith("-O2 -O1 --model-type")
    assert told == ["NEURON_RT_EXEC_TIMEOUT=7 is set, and neuron.exec_timeout says 9: that is taken"]


@pytest.mark.parametrize("mode", get_args(Precision))
def test_a_second_time_changes_nothing(mode):
    job = Job(precision=mode, instance=TRN2, keys={"compiler_flags": "-O1 --verbose=info", "exec_timeout": 9})
    environ = {"NEURON_CC_FLAGS": "--verbose debug"}
    apply(settings(job), environ)
    once = dict(environ)
    assert apply(settings(job), environ) == []
    assert environ == once


def test_a_variable_that_makes_the_run_wrong():
    told = apply([], {"XLA_USE_BF16": "1", "XLA_DOWNCAST_BF16": "0"})
    assert told == [
        "XLA_USE_BF16=1 turns every float32 tensor into bf16, main parameters and losses too; "
        "unset it: trainer.precision and neuron.precision choose dtypes tensor by tensor"
    ]


def test_the_page_is_of_this_table():
    root = Path(__file__).resolve().parents[2]
    page = subprocess.run(
        [sys.executable, str(root / "tools" / "environment.py")], capture_output=True, text=True, check=True
    ).stdout
    assert (root / "docs" / "environment.md").read_text(encoding="utf-8") == page
