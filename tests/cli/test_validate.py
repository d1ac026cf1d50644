"""`nxdt-nemo validate` and `nxdt-nemo configs`, as a user meets them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from nxdt_nemo.cli.app import app
from nxdt_nemo.errors import UserError

LIGHT = """
import sys
from nxdt_nemo.cli.main import main
try:
    main(["validate", "train", "model=llama3_1_405b", "target=trn2"])
finally:
    heavy = {"torch", "nemo", "megatron", "lightning", "numpy"}
    print("HEAVY", sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def ours(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_a_good_one_says_what_is_to_be_set_and_what_it_needs():
    done = ours("validate", "train", "model=llama3_8b", "target=trn2")
    assert done.exit_code == 0
    assert "model.data.data_prefix" in done.stdout
    assert "of 24 GiB a NeuronCore of trn2.48xlarge" in done.stdout
    assert done.stdout.rstrip().endswith("train: good, 64 ranks")


def test_a_wrong_one_is_a_line_a_mistake_and_exit_code_1():
    done = ours("validate", "--strict", "train", "model.num_layers=two", "+model.sequence_paralel=true")
    assert done.exit_code == 1
    errors = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert errors == [
        "error    train: model.num_layers=two is not a positive whole number",
        "error    train: unknown key model.sequence_paralel; did you mean sequence_parallel?",
    ]


def test_states_that_do_not_fit_are_an_error():
    done = ours(
        "validate",
        "train",
        "model=gpt3_175b",
        "model.tensor_model_parallel_size=8",
        "model.pipeline_model_parallel_size=8",
    )
    assert done.exit_code == 1
    assert "memory: needs" in done.stdout
    assert "of 16 GiB a NeuronCore" in done.stdout


def test_preferences_are_good_and_leave_room_for_answers():
    done = ours("validate", "train", "workflow=dpo")
    assert done.exit_code == 0
    done = ours("validate", "train", "workflow=orpo", "neuron.alignment.orpo.max_prompt_length=8192")
    assert done.exit_code == 1
    assert "neuron.alignment.orpo.max_prompt_length=8192 leaves no room" in done.stdout


def test_json():
    found = json.loads(ours("validate", "--json", "train").stdout)
    assert found["good"] is True
    assert found["ranks"] == 128
    assert "model.tokenizer.type" in found["to_be_set"]


def test_it_loads_nothing_heavy(start):
    done = start("-c", LIGHT)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout + done.stderr


def test_list():
    done = ours("configs", "list")
    for word in ("llama3_1_405b", "trn2", "orpo", "201 go together"):
        assert word in done.stdout


def test_show_prints_one_file_that_validates(tmp_path):
    done = ours("configs", "show", "model=mistral_7b", "target=cpu", "workflow=sft")
    file = tmp_path / "whole.yaml"
    file.write_text(done.stdout)
    assert "defaults" not in done.stdout.split("\n")[1]
    assert ours("validate", "--strict", str(file)).exit_code == 0


def test_show_without_a_choice_is_the_default_composition():
    done = ours("configs", "show")
    assert done.exit_code == 0
    assert "# nxdt-nemo configs show\ntrainer:\n" in done.stdout


def test_what_another_product_reads_is_told_to_migrate(tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text("model_source: hf\ndistributed_strategy: {zero1: true}\nprecision: {type: bf16SR}\nmodel: {}\n")
    line = "theirs.yaml: is written for neuronx-distributed-training; nxdt-nemo migrate makes NeMo's of it"
    assert f"warning  {line}" in ours("validate", str(file)).stdout
    done = ours("launch", str(file), "--target", "cpu")
    assert "is written for neuronx-distributed-training; nxdt-nemo migrate" in str(done.exception)


@pytest.mark.parametrize(
    "option, said",
    [
        ("model=llama3_8", "model=llama3_8 is not there; did you mean llama3_8b?"),
        ("model=3", "Config group override must be a string or a list. Got int"),
    ],
)
def test_an_option_of_a_group_that_is_not_there(option, said):
    assert str(ours("validate", "train", option).exception) == f"train.yaml: {said}"


@pytest.mark.parametrize(
    "argument, fix",
    [
        ("model=llama3_8", "did you mean llama3_8b?"),
        ("target=trn9", "did you mean trn"),
        ("workflow=rlhf", "use pretrain"),
    ],
)
def test_an_option_that_is_not_there(argument, fix):
    done = ours("configs", "show", argument)
    assert isinstance(done.exception, UserError)
    assert fix in str(done.exception)


def test_what_does_not_go_together():
    done = ours("configs", "show", "model=bert", "workflow=sft")
    assert str(done.exception) == "workflow=sft: is for decoders; bert has workflow=pretrain"
