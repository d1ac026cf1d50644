"""Positions and activation checkpointing in a configuration: the line for each mistake, and silence otherwise."""

from __future__ import annotations

import pytest

from nxdt_nemo.config import check

POSITION = "++model.position_embedding_type"
GRANULARITY = "++model.activations_checkpoint_granularity"
METHOD = "++model.activations_checkpoint_method"
COUNT = "++model.activations_checkpoint_num_layers"
KEYS = {"granularity": GRANULARITY[2:], "method": METHOD[2:], "count": COUNT[2:]}

WRONG = [  # overrides, the line
    (
        [f"{POSITION}=kerple"],
        "model.position_embedding_type=kerple is of NeMo's legacy models; megatron-core would train without positions; "
        "use learned_absolute, rope, none or alibi",
    ),
    (
        [f"{POSITION}=alibi", "++model.context_parallel_size=2", "trainer.devices=2"],
        "model.position_embedding_type=alibi needs whole sequences; use model.context_parallel_size=1",
    ),
    (
        [f"{POSITION}=rotary"],
        "model.position_embedding_type=rotary is not a kind of position embedding; megatron-core would train without "
        "positions; use learned_absolute, rope, none or alibi",
    ),
    ([f"{GRANULARITY}=some"], "{granularity}=some is not known; use selective, full or null"),
    ([f"{GRANULARITY}=full", f"{METHOD}=even", f"{COUNT}=1"], "{method}=even is not known; use uniform, block or null"),
    (
        [f"{GRANULARITY}=full", f"{COUNT}=1"],
        "{granularity}=full needs a method; use {method}=uniform or {method}=block",
    ),
    ([f"{GRANULARITY}=full", f"{METHOD}=block"], "{granularity}=full needs a number of layers; use {count}=1"),
    (
        [f"{GRANULARITY}=selective", f"{COUNT}=2"],
        "{granularity}=selective recomputes a part of every layer, but {count}=2; use null",
    ),
    (
        [f"{GRANULARITY}=full", f"{METHOD}=uniform", f"{COUNT}=3"],
        "{method}=uniform: {count}=3 does not divide the 4 layers of a stage; use 1, 2 or 4",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), WRONG)
def test_a_mistake_is_one_line(errors, overrides, line):
    assert errors(*overrides) == [f"tiny_gpt.yaml: {line.format(**KEYS)}"]


RIGHT = [
    [f"{POSITION}=rope"],
    [f"{POSITION}=none"],
    [f"{POSITION}=alibi", "++model.attention_dropout=0.1"],
    [f"{GRANULARITY}=selective"],
    [f"{GRANULARITY}=selective", f"{METHOD}=uniform"],
    [f"{GRANULARITY}=full", f"{METHOD}=uniform", f"{COUNT}=2"],
    [f"{GRANULARITY}=full", f"{METHOD}=block", f"{COUNT}=3"],
    [f"{METHOD}=even", f"{COUNT}=3"],  # nothing is recomputed
]


@pytest.mark.parametrize("overrides", RIGHT)
def test_what_megatron_core_takes_is_let_through(gpt, overrides):
    assert [str(error) for error in check(gpt(*overrides)).errors] == []
