"""The table: every key of every upstream configuration has a rule, and no rule points nowhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from nxdt_nemo.config.keys import load
from nxdt_nemo.config.migrate.derive import DERIVED
from nxdt_nemo.config.migrate.engine import WHOLE, dialect_of
from nxdt_nemo.config.migrate.rules import DIALECTS, rule_for, table
from nxdt_nemo.config.migrate.tree import Document
from nxdt_nemo.config.neuron import NeuronConfig

DATA = Path(__file__).with_name("data")
# What NNM's scripts add on the command line, and what NxD Training reads without naming it in a file.
ADDED = {
    "nnm": ["model.save_xser", "model.load_xser", "model.use_flash_attention"],
    "nxdt": ["model.positition_interpolation_factor", "model.position_freq_base", "model.megatron_amp_O2"],
}


@pytest.mark.parametrize("repository", DIALECTS)
def test_every_key_of_every_upstream_configuration_has_a_rule(repository):
    found = json.loads((DATA / f"{repository}.json").read_text())
    assert len(found["files"]) >= 22
    for name, numbers in found["files"].items():
        keys = [found["keys"][number] for number in numbers]
        dialect = _dialect(keys)
        part = not any(key == whole or key.startswith(f"{whole}.") for key in keys for whole in WHOLE)
        missing = [key for key in keys if not part and not _covered(key, dialect)]
        assert missing == [], name


@pytest.mark.parametrize("dialect", ADDED)
def test_keys_that_no_file_has(dialect):
    assert [key for key in ADDED[dialect] if not _covered(key, dialect)] == []


def test_a_key_that_nobody_reads_has_none():
    assert not _covered("model.num_layerz", "nemo")
    assert not _covered("model.wrap_with_zero", "nemo")  # NNM's alone
    assert not _covered("distributed_strategy.zero1", "nnm")


def test_targets_exist():
    known = load().knows
    fields = {f"neuron.{name}" for name in NeuronConfig.model_fields}
    for rule in table():
        paths = rule.key if rule.action == "default" else (rule.to,)
        for path in paths:
            assert not path or "*" in path or known(path) or path in fields, f"{rule.file}: {path}"


def test_each_derivation_is_named_and_there():
    assert {rule.by for rule in table() if rule.by} <= set(DERIVED)


def test_everything_has_a_reason_in_one_sentence():
    for rule in table():
        assert rule.why and not rule.why.endswith("."), rule.key


def test_wildcards():
    rule = rule_for("data.tokenizer.special_tokens.bos", None, "nxdt", knows=False)
    assert rule is not None
    assert rule.target("data.tokenizer.special_tokens.bos") == "model.tokenizer.special_tokens.bos"
    assert rule_for("data.micro_batch_size", 1, "nxdt", knows=False).target("data.micro_batch_size") == (
        "model.micro_batch_size"
    )


@cache
def _covered(key, dialect):
    return rule_for(key, None, dialect, load().knows(key)) is not None


def _dialect(keys):
    lines: dict[str, object] = {}
    for key in keys:
        node = lines
        *above, last = key.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = None
    import yaml

    return dialect_of(Document(yaml.safe_dump(lines)))
