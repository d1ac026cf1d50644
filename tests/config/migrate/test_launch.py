"""Launch scripts: bash in, bash out, no line lost."""

from __future__ import annotations

import json
import subprocess

import pytest

from nxdt_nemo.config.migrate.launch import translate

NNM = """#!/usr/bin/env bash
source ./train_setup.sh
: ${TP:=8}
export NCCL_DEBUG=INFO
export XLA_USE_BF16=1
export NEURON_RT_EXEC_TIMEOUT=100
sudo sysctl -w net.ipv4.ip_local_reserved_ports=41000
frobnicate --all

$MAYBE_COMPILE torchrun $DISTRIBUTED_ARGS megatron_gpt_pretraining.py  \\
    --config-path=conf \\
    --config-name=megatron_llama_config \\
    trainer.devices=$PROCESSES_PER_NODE \\
    trainer.max_steps=10\\
    model.tensor_model_parallel_size=$TP \\
    model.num_kv_heads=8 \\
    model.wrap_with_zero=$wrap_with_zero \\
    +model.save_xser=True \\
    model.data.data_prefix=[1.0,$HOME/text] \\
    model.optim.name=$OPTIM_NAME 2>&1 | tee -a $LOG_PATH/log
"""


def words(text):
    return text.replace("\\\n", " ").split()


def test_nnm():
    found = translate(NNM, place="test_llama.sh")
    said = words(found.text)
    at = said.index("torchrun")
    assert said[at : at + 9] == [
        *("torchrun", "$DISTRIBUTED_ARGS", "-m", "nxdt_nemo", "run", "--config", "conf/megatron_llama_config.yaml"),
        *("--train-setup", "train_setup.sh"),
    ]
    for word in (
        "trainer.max_steps=10",
        "++model.num_query_groups=8",
        "model.data.data_prefix=[1.0,$HOME/text]",
        "tee",
    ):
        assert word in said, word
    for word in ("model.wrap_with_zero", "save_xser", "$OPTIM_NAME", "$MAYBE_COMPILE"):
        assert word not in found.text, word
    assert "# export NCCL_DEBUG=INFO" in found.text
    assert "# export XLA_USE_BF16=1" in found.text
    assert "\nexport NEURON_RT_EXEC_TIMEOUT=100" in found.text  # a variable that is set wins
    assert "# sudo sysctl" in found.text
    assert [line.text for line in found.unknown] == ["frobnicate --all"]
    assert "\nfrobnicate --all\n" in found.text


@pytest.mark.parametrize("line", ["./test.sh", "srun --nodes 2 ./train.sh --now", "sbatch job.slurm"])
def test_a_script_that_is_started_is_to_be_migrated_too(line):
    found = translate(f"{line}\nsrun hostname\n")
    assert found.text == f"{line}\nsrun hostname\n"
    assert "(a script of its own: migrate it too)" in found.show("table").splitlines()[0]
    assert len(found.show("table").splitlines()) == 2


def test_nxdt():
    text = "source ./train_setup.sh\ntorchrun $DISTRIBUTED_ARGS training_orchestrator.py --config-path=conf \\\n"
    found = translate(f"{text}  --config-name=$CONF_FILE data.micro_batch_size=2 compiler_flags=-O1\n")
    assert found.dialect == "nxdt"
    line = " ".join(words(found.text))
    assert "-m nxdt_nemo run --config conf/$CONF_FILE.yaml ++model.micro_batch_size=2" in line
    assert "++neuron.compiler_flags=-O1" in line


@pytest.mark.parametrize(
    "line, now",
    [
        (
            "python megatron_gpt_pretraining.py --config-name=x trainer.accelerator=gpu model.sharp=True",
            "nxdt-nemo run megatron_gpt_pretraining.py --config-name=x trainer.accelerator=neuron",
        ),
        (
            "srun python -u /opt/NeMo/examples/train.py trainer.precision=16",
            "srun nxdt-nemo run /opt/NeMo/examples/train.py trainer.precision=bf16 trainer.accelerator=neuron",
        ),
        (
            "torchrun --nproc-per-node=8 train.py model.seed=1 &",
            "torchrun --nproc-per-node=8 -m nxdt_nemo run train.py model.seed=1 trainer.accelerator=neuron &",
        ),
        (
            "CUDA_VISIBLE_DEVICES=0,1 FOO=1 python train.py model.seed=1; echo done",
            "FOO=1 nxdt-nemo run train.py model.seed=1 trainer.accelerator=neuron ; echo done",
        ),
        (
            "torchrun --nnodes 2 -m pkg.train model.seed=1 > log 2>&1",
            "torchrun --nnodes 2 -m nxdt_nemo run -m pkg.train model.seed=1 trainer.accelerator=neuron > log 2>&1",
        ),
        (
            "python -m torch.distributed.run --nnodes 2 train.py model.seed=1",
            "python -m torch.distributed.run --nnodes 2 -m nxdt_nemo run train.py model.seed=1 "
            "trainer.accelerator=neuron",
        ),
        ("python -m pip install nemo==2.4", "python -m pip install nemo==2.4"),
        ("export NCCL_DEBUG=INFO FOO=1; CUDA_X=2", "export FOO=1"),
        ("FOO=1 make all", "FOO=1 make all"),
    ],
)
def test_nemo(line, now):
    assert " ".join(words(translate(f"{line}\n").text)) == now


@pytest.mark.parametrize(
    "word",
    ['+exp_manager.name="my run"', "model.x='a b'", 'model.nodes=$(echo "$A (x)" | wc -l)', "a=$(b $(c $(d e)))"],
)
def test_spaces_in_quotes_are_of_the_word(word):
    said = translate(f"python train.py {word} model.seed=1  # why\n").text.split(" \\\n")
    assert [line.strip() for line in said[1:3]] == [word, "model.seed=1"]


def test_a_text_of_more_than_one_line_stays():
    text = 'ARGS="a\n  b"\nexport X=1 \\\n  Y=2\n'
    assert translate(text).text == text


def test_what_is_written_is_bash():
    for text in (NNM, NNM.replace("train_setup.sh", "other.sh")):
        done = subprocess.run(["bash", "-n"], input=translate(text).text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_no_line_is_lost():
    text = '#!/bin/bash\n#SBATCH --nodes=2\nset -e\nif [ -n "$X" ]; then\n  cd /data\nfi\n\n./other.sh\n'
    assert translate(text).text == text


def test_reports():
    found = translate(NNM, place="a.sh")
    assert json.loads(found.show("json"))["from"] == "nnm"
    assert "| 8 | unknown | `frobnicate --all` |" in found.show("markdown")
    assert found.show("table").splitlines()[-1].startswith("a.sh: launch script of nnm: ")
