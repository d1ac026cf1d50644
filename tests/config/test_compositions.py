"""The configurations that we ship."""

from __future__ import annotations

import re

import pytest

from nxdt_nemo._resources import folder
from nxdt_nemo.config.compositions import Composition, about, compositions, options
from nxdt_nemo.config.validate import read, validate_config

CONFIGS = folder("configs")
# One of each model, target and workflow; all 201: python tools/configs.py --check
SOME = [
    Composition("gpt3_175b", "trn2", "pretrain"),
    Composition("llama3_8b", "trn2", "sft"),
    Composition("llama3_1_405b", "trn1", "lora"),
    Composition("mixtral_8x7b", "trn1", "dpo"),
    Composition("mistral_7b", "cpu", "orpo"),
    Composition("bert", "trn1", "pretrain"),
    Composition("t5", "cpu", "pretrain"),
]


@pytest.mark.parametrize("job", SOME, ids=str)
def test_it_validates_strictly(job):
    found = validate_config(read(CONFIGS / "train.yaml", job.overrides), strict=True)
    assert [str(error) for error in found.errors] == []
    assert found.warnings == []
    assert "model.tokenizer.type" in found.to_be_set or "model.tokenizer.vocab_file" in found.to_be_set


def test_all_of_the_issue_are_there():
    assert set(options("model")) == {
        *("gpt3_125m", "gpt3_23b", "gpt3_175b", "llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b"),
        *("llama3_1_8b", "llama3_1_70b", "llama3_1_405b", "mistral_7b", "mixtral_8x7b", "bert", "t5"),
    }
    assert options("target") == ["trn1", "trn2", "cpu"]
    assert options("workflow") == ["pretrain", "sft", "lora", "dpo", "orpo"]


def test_what_goes_together():
    assert sum(1 for _ in compositions()) == 3 * (13 * 5 + 2)
    assert not Composition("bert", "trn1", "sft").fits
    assert list(compositions(model="t5", target="cpu")) == [Composition("t5", "cpu", "pretrain")]


@pytest.mark.parametrize("group", ["model", "workflow", "target"])
def test_a_file_says_what_it_is_first(group):
    for name in options(group):
        assert 5 < len(about(group, name)) < 120, name


def test_every_model_and_layout_has_a_source():
    sources = re.compile(r"arXiv:|config\.json|NxD Training|neuronx-nemo-megatron|Data parallel alone")
    for file in [*CONFIGS.glob("model/*.yaml"), *CONFIGS.glob("layout/trn*/*.yaml")]:
        comment = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
        assert sources.search(comment), file


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_every_model_has_a_layout(target):
    assert {file.stem for file in (CONFIGS / "layout" / target).glob("*.yaml")} == set(options("model"))
