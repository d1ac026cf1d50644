"""A user's mistake is one line that names the key and the fix, exit code 2, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run

MISTAKES = [  # overrides, what the line must name
    (["trainer.precision=16"], ["trainer.precision", "bf16"]),
    (["++model.fp8=true"], ["model.fp8"]),
    (["model.tensor_model_parallel_size=3", "trainer.devices=3"], ["tensor_model_parallel_size=3", "num_attention"]),
    (["trainer.devices=3", "model.tensor_model_parallel_size=2"], ["3 ranks", "tensor_model_parallel_size=2"]),
    (["model.data.data_prefix=???"], ["model.data.data_prefix"]),
    (["model.data.data_prefix=[1.0,/nowhere/text]"], ["model.data.data_prefix", "/nowhere/text"]),
    (
        ["model.optim.name=distributed_fused_adam", "++model.optim.disable_distributed_parameters=true"],
        ["model.optim.disable_distributed_parameters", "use model.optim.name=fused_adam"],
    ),
    (["model.mcore_gpt=false"], ["model.mcore_gpt"]),
    (["model.hidden_size=wide"], ["model.hidden_size=wide", "whole number"]),
    (
        ["++neuron.instance=trn1.2xlarge", "trainer.devices=2", "model.hidden_size=32768", "model.num_layers=40"],
        ["memory", "GiB a NeuronCore of trn1.2xlarge"],
    ),
    (
        ["++neuron.alignment.orpo.beta=0.1", "++model.data.train_ds.file_names=[pairs.jsonl]"],
        ["neuron.alignment.orpo", "nxdt-nemo run --config"],
    ),
    (["++model.tokenizer._target_=os.system"], ["_target_=os.system"]),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=lambda value: str(value[0]))
def test_one_line(train: Callable[..., Run], overrides: list[str], words: list[str]) -> None:
    run = train(*overrides)
    lines = [line for line in run.output.splitlines() if line.strip()]
    assert run.code == 2, run.output
    assert len(lines) == 1, run.output
    assert all(word in lines[0] for word in words), lines[0]


def test_unknown_lane(train: Callable[..., Run]) -> None:
    run = train(environment={"NXDT_NEMO_RUNTIME": "tpu"})
    assert run.code == 2
    line = "nxdt-nemo: NXDT_NEMO_RUNTIME=tpu: 'tpu' is not a lane; use auto, cpu, xla or neuron"
    assert run.output.splitlines() == [line]


def test_missing_script(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(script=tmp_path / "gone.py")
    assert run.code == 2
    assert "gone.py" in run.output
    assert "Traceback" not in run.output


def test_a_key_that_nobody_reads_is_a_warning(train: Callable[..., Run]) -> None:
    steps = ["trainer.max_steps=1", "trainer.val_check_interval=1", "exp_manager.create_checkpoint_callback=false"]
    run = train("+model.hiden_dropout=0.1", *steps)
    assert run.code == 0, run.output[-3000:]
    warning = next(line for line in run.output.splitlines() if "hiden_dropout" in line and "nxdt_nemo" in line)
    assert "did you mean" in warning
    assert "hidden_dropout" in warning


@pytest.mark.ranks
def test_two_ranks_say_it_once(train: Callable[..., Run]) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "nxdt_nemo", "run")
    run = train("trainer.precision=16", "trainer.devices=2", command=launcher)
    assert run.code != 0
    assert sum("trainer.precision" in line and "bf16" in line for line in run.output.splitlines()) == 1
    assert "nxdt_nemo/" not in run.output  # no traceback through us
