"""NeMo's own GPT of before megatron-core, which NNM and NxDT's Megatron style go on with.

Room checkpoint/ (leaf). Keys are those of a rank without the prefix (`model.` in NeMo and NNM). Who fuses what:
    attention   query_key_value: NeMo, NNM's multi-head models and its --gqa_qkv; query and key_value: NNM and NxDT
                with grouped queries
    gated MLP   dense_h_to_4h is [gate; up]: NNM, NxDT, NeMo's fast-swiglu; dense_h_to_4h and _2: NeMo's swiglu
    experts     NxDT: one array [experts, in, out] for all experts of a rank
Rows come in the order of the modules, by which ZeRO-1 numbers parameters. May import this room.
Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nxdt_nemo.checkpoint.placement import (
    Blocks,
    Dialect,
    Groups,
    Pairs,
    Row,
    Same,
    gated,
    not_gated,
    tied_and_split,
    untied,
)

__all__ = ["Spelling", "nemo_legacy", "spelling_of"]

_ROOT = "language_model."
_WHATS = ("weight", "bias")


@dataclass(frozen=True)
class Spelling:
    """What differs between those who use these names.

    split   query and key_value instead of query_key_value
    two     dense_h_to_4h and dense_h_to_4h_2 instead of one array
    head    the last stage's copy of a tied embedding
    """

    split: bool = False
    two: bool = False
    head: Literal["word_embeddings.weight", "word_embeddings_for_head.weight"] = "word_embeddings.weight"


def spelling_of(keys: Sequence[str]) -> Spelling:
    """The spelling that a rank's keys have."""
    return Spelling(
        split=any(".self_attention.key_value." in key for key in keys),
        two=any(".mlp.dense_h_to_4h_2." in key for key in keys),
    )


def _rows(spelling: Spelling) -> Iterator[Row]:
    for key, name in (("word", "word"), ("position", "position"), ("tokentype", "token_type")):
        yield Row(_ROOT + f"embedding.{key}_embeddings.weight", Same(f"embedding.{name}.weight"), on="first")
    layer, mine = _ROOT + "encoder.layers.{l}.", "layers.{l}."
    for what in _WHATS:
        yield Row(layer + f"input_layernorm.{what}", Same(mine + f"attention.norm.{what}"))
    at = layer + "self_attention."
    names = [[mine + f"attention.{one}.{what}" for one in "qkv"] for what in _WHATS]
    if spelling.split:
        yield from (Row(at + f"query.{what}", Same(q)) for what, (q, _, _) in zip(_WHATS, names, strict=True))
        yield from (Row(at + f"key_value.{what}", Pairs(k, v)) for what, (_, k, v) in zip(_WHATS, names, strict=True))
    else:
        yield from (Row(at + f"query_key_value.{what}", Groups(*qkv)) for what, qkv in zip(_WHATS, names, strict=True))
    for what in _WHATS:
        yield Row(at + f"dense.{what}", Same(mine + f"attention.out.{what}"))
    for what in _WHATS:
        yield Row(layer + f"post_attention_layernorm.{what}", Same(mine + f"mlp.norm.{what}"))
    yield from _mlp(layer + "mlp.", mine, spelling)
    for what in _WHATS:
        yield Row(_ROOT + f"encoder.final_layernorm.{what}", Same(f"final_norm.{what}"), on="last")
    # NNM's converter for large models puts the head of an untied model where tied ones have their copy.
    yield Row(
        _ROOT + "output_layer.weight",
        Same("head.weight"),
        also=("word_embeddings.weight", "word_embeddings_for_head.weight"),
        on="last",
        when=untied,
    )
    copy = Same("embedding.word.weight")
    other = ("word_embeddings.weight", "word_embeddings_for_head.weight")
    yield Row(spelling.head, copy, also=other, on="last", when=tied_and_split)


def _mlp(at: str, mine: str, spelling: Spelling) -> Iterator[Row]:
    gate, up, down = (mine + f"mlp.{one}.weight" for one in ("gate", "up", "down"))
    if spelling.two:
        yield Row(at + "dense_h_to_4h.weight", Same(gate), when=gated)
        yield Row(at + "dense_h_to_4h_2.weight", Same(up), when=gated)
    else:
        yield Row(at + "dense_h_to_4h.weight", Blocks(gate, up), when=gated)
    yield Row(at + "dense_h_to_4h.weight", Same(up), when=not_gated)
    yield Row(at + "dense_h_to_4h.bias", Same(mine + "mlp.up.bias"))
    yield Row(at + "dense_4h_to_h.weight", Same(down))
    yield Row(at + "dense_4h_to_h.bias", Same(mine + "mlp.down.bias"))
    yield from moe(at, mine)


def moe(at: str, mine: str) -> Iterator[Row]:
    """NxD's mixture of experts; an expert is a row of arrays that all experts of a rank share."""
    one, base = mine + "experts.{e}.", at + "moe.expert_mlps.mlp_op."
    yield Row(at + "moe.router.linear_router.weight", Same(mine + "router.weight"))
    up = Blocks(one + "gate.weight", one + "up.weight", turned=True)
    # NxD's converter renames these two with the dense ones in Megatron's style.
    yield Row(base + "gate_up_proj.weight", up, also=(base + "dense_h_to_4h.weight",))
    yield Row(base + "down_proj.weight", Same(one + "down.weight", turned=True), also=(base + "dense_4h_to_h.weight",))


def nemo_legacy(spelling: Spelling) -> Dialect:
    """The rows of a rank's file."""
    return tuple(_rows(spelling))
