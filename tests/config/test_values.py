"""What value a key takes, and which keys have to be there."""

from __future__ import annotations

import tomllib

import pytest
from omegaconf import OmegaConf, open_dict

from nxdt_nemo._resources import folder
from nxdt_nemo.config import check
from nxdt_nemo.config.keys import load as load_keys
from nxdt_nemo.config.values import WORDS, load

KEYS = folder("configs") / "keys"


@pytest.mark.parametrize(
    "override, line",
    [
        ("model.hidden_size=wide", "model.hidden_size=wide is not a whole number"),
        ("model.hidden_size=32.5", "model.hidden_size=32.5 is not a whole number"),
        ("model.hidden_size=[32]", "model.hidden_size=[32] is not a whole number"),
        ("model.hidden_size=0", "model.hidden_size=0 is less than 1; use 1 or more"),
        ("model.hysteresis=-1", "model.hysteresis=-1 is less than 0; use 0 or more"),
        ("model.sequence_parallel='yes'", "model.sequence_parallel=yes is not True or False"),
        (
            "model.sequence_parallel='False'",
            "model.sequence_parallel=False is not True or False; write it without quotes",
        ),
        ("model.optim.lr=high", "model.optim.lr=high is not a number"),
        ("model.optim.lr=20", "model.optim.lr=20 is more than 10; use 10 or less"),
        ("+model.optim.betas=0.9", "model.optim.betas=0.9 is not a list; write [0.9]"),
        (
            "+model.optim.betas=[0.9,1.0]",
            "model.optim.betas=[0.9, 1.0] is not two numbers from 0 to below 1; use [0.9, 0.95]",
        ),
        ("+model.hidden_dropout=1.5", "model.hidden_dropout=1.5 is more than 1; use 1 or less"),
        ("+model.activation=swigloo", "model.activation=swigloo is not known; did you mean swiglu?"),
        ("model.tokenizer=GPT2", "model.tokenizer=GPT2 is not a section"),
        ("~model.seed", "model.seed is not set: megatron_base_model.py reads it; set model.seed"),
        ("model.hidden_size=null", "model.hidden_size is null: megatron_base_model.py reads it; set model.hidden_size"),
        ("~model.data", "model.data is not set: megatron_gpt_model.py reads it; set model.data"),
    ],
)
def test_a_wrong_value_is_one_line(errors, override, line):
    assert errors(override) == [f"tiny_gpt.yaml: {line}"]


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size='32'",
        "model.sequence_parallel=0",
        "model.optim.lr=1",
        "model.kv_channels=null",
    ],
)
def test_what_upstream_takes_passes(errors, override):
    assert errors(override if "kv_" not in override else f"+{override}") == []


def test_a_value_of_another_kind_is_said_once(errors):
    assert errors("trainer.max_steps=many") == ["tiny_gpt.yaml: trainer.max_steps=many is not a whole number"]


def test_a_missing_key_is_no_matter_without_training(gpt):
    cfg = gpt()
    with open_dict(cfg):
        del cfg.model["seed"]
    assert check(cfg, training=False).errors == []
    assert check(cfg, training=True).errors != []


def test_keys_that_are_not_written_are_listed_with_what_they_are(gpt):
    cfg = gpt("+model.bias=False")
    listed = {default.key: default.value for default in check(cfg).defaults}
    assert listed["model.hidden_dropout"] == 0.1  # megatron-core's
    assert listed["model.normalization"] == "layernorm"  # NeMo's
    assert listed["trainer.num_sanity_val_steps"] is None
    assert "model.bias" not in listed


def test_doubts_are_warnings_and_errors_when_strict(gpt):
    doubtful = ("model.hidden_size=66", "model.num_attention_heads=4")
    cfg = gpt(*doubtful)
    line = "model.num_attention_heads=4 does not divide model.hidden_size=66"
    assert any(line in warning for warning in check(cfg).warnings)
    assert check(cfg).errors == []
    assert any(line in str(error) for error in check(cfg, strict=True).errors)
    assert any(line in str(error) for error in check(gpt(*doubtful, "+neuron.strict_keys=True")).errors)


@pytest.mark.parametrize(
    "name, said",
    [
        ("run-{step}-{consumed_samples}", False),
        ("run-{step}", True),
        ("run-{consumed_samples} +exp_manager.checkpoint_callback_params.auto_insert_metric_name=False", True),
    ],
)
def test_a_checkpoint_whose_name_says_nothing_of_its_data_is_a_doubt(gpt, name, said):
    name, *more = name.split()
    cfg = gpt("++exp_manager.create_checkpoint_callback=True", *more)
    OmegaConf.update(cfg, "exp_manager.checkpoint_callback_params.filename", name, force_add=True)
    found = [error.reason for error in check(cfg).doubts if "has no consumed_samples=" in error.reason]
    assert bool(found) is said


def test_a_name_that_is_like_none_of_nemos_is_a_doubt(gpt):
    (found,) = check(gpt("model.optim.sched.name=Cosin")).doubts
    assert found.reason == "model.optim.sched.name=Cosin is none of NeMo's"


def test_a_checkpoint_to_resume_from_says_how_far_its_data_went(gpt):
    for path, said in (("/x/a--consumed_samples=8.0", False), ("/x/a-last", True)):
        cfg = gpt(f"++exp_manager.resume_from_checkpoint='{path}'")
        assert any("begin anew" in str(doubt) for doubt in check(cfg).doubts) is said


def test_an_interpolation_of_nothing_is_a_doubt(gpt):
    cfg = gpt("+model.kv_channels='${model.no_such_key}'")
    assert [error.reason for error in check(cfg).doubts] == [
        "model.kv_channels=${model.no_such_key}: Interpolation key 'model.no_such_key' not found"
    ]


def test_the_tables_are_about_keys_that_nemo_reads():
    hand = tomllib.loads((KEYS / "values.toml").read_text())
    for name in ("kinds", "choices", "defaults"):
        for path in hand[name]:
            assert "*" in path or load_keys().knows(path), path
    for model, keys in load().required.items():
        assert [path for path in keys if not load_keys().knows(path)] == [], model


def test_kinds_are_kinds():
    assert {kind for kinds in load().kinds.values() for kind in kinds} <= set(WORDS)


def test_every_required_key_of_a_model_is_usual_there():
    for model, keys in load().required.items():
        assert set(keys) - load().usual[model] == set(), model
