"""megatron-core 0.13's names (GPTModel), for its distributed checkpoints and for per-rank files.

Room checkpoint/ (leaf). Layer specs differ in the names of norms: TransformerEngine fuses them into the linear layer
that follows, `local` has modules of their own; distributed checkpoints have TransformerEngine's names with either, but
for the norm before experts.
May import this room. Proof: tests/checkpoint/test_families.py, test_resume.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import (
    Blocks,
    Copied,
    Dialect,
    Groups,
    Pairs,
    Row,
    Same,
    copied,
    gated,
    not_copied,
    not_gated,
    tied_and_split,
    untied,
)

__all__ = ["DISTRIBUTED", "DISTRIBUTED_TE", "PER_RANK", "PER_RANK_TE"]

Spec = Literal["local", "te"]
_BOTH = ("weight", "bias")


def _rows(stacked: bool, spec: Spec) -> Iterator[Row]:
    layer, mine = ("decoder.layers." if stacked else "decoder.layers.{l}."), "layers.{l}."
    over: Literal["", "l"] = "l" if stacked else ""

    def row(name: str, te: str, how: Blocks | Groups | Same, **more: object) -> Row:
        first, second = (te, name) if spec == "te" else (name, te)
        also = (layer + second,) if second != first else ()
        return Row(layer + first, how, also=also, stacked=over, **more)  # type: ignore[arg-type]

    yield Row("embedding.word_embeddings.weight", Same("embedding.word.weight"), on="first")
    yield Row("embedding.position_embeddings.weight", Same("embedding.position.weight"), on="first")
    yield Row("embedding.tokentype_embeddings.weight", Same("embedding.token_type.weight"), on="first")
    yield from _attention(row, mine, spec, stacked)
    norms = [
        row(f"pre_mlp_layernorm.{w}", f"mlp.linear_fc1.layer_norm_{w}", Same(mine + f"mlp.norm.{w}")) for w in _BOTH
    ]
    fc1, fc2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
    yield from norms
    yield row(fc1, fc1, Blocks(mine + "mlp.gate.weight", mine + "mlp.up.weight"), when=gated)
    yield row(fc1, fc1, Same(mine + "mlp.up.weight"), when=not_gated)
    yield row("mlp.linear_fc1.bias", "mlp.linear_fc1.bias", Same(mine + "mlp.up.bias"))
    yield row(fc2, fc2, Same(mine + "mlp.down.weight"))
    yield row("mlp.linear_fc2.bias", "mlp.linear_fc2.bias", Same(mine + "mlp.down.bias"))
    yield row("mlp.router.weight", "mlp.router.weight", Same(mine + "router.weight"))
    yield from _experts(layer, mine, stacked)
    yield Row("decoder.final_layernorm.weight", Same("final_norm.weight"), on="last")
    yield Row("decoder.final_layernorm.bias", Same("final_norm.bias"), on="last")
    yield Row("output_layer.weight", Same("head.weight"), on="last", when=untied)
    if not stacked:  # the last stage's copy
        yield Row("output_layer.weight", Same("embedding.word.weight"), on="last", when=tied_and_split)


def _attention(row: Callable[..., Row], mine: str, spec: Spec, stacked: bool) -> Iterator[Row]:
    """In the order of the modules: with TransformerEngine the norm is a part of linear_qkv.

    Arrays of the whole model have no copies of key-value heads; a rank's file has them where there are more ranks.
    """
    at = "self_attention."
    norm = [
        row(f"input_layernorm.{w}", at + f"linear_qkv.layer_norm_{w}", Same(mine + f"attention.norm.{w}"))
        for w in _BOTH
    ]
    out = [row(at + f"linear_proj.{w}", at + f"linear_proj.{w}", Same(mine + f"attention.out.{w}")) for w in _BOTH]
    yield from (*out, *norm) if spec == "te" else (*norm, *out)
    for what in _BOTH:
        name = at + f"linear_qkv.{what}"
        q, k, v = (mine + f"attention.{one}.{what}" for one in "qkv")
        if stacked:
            yield row(name, name, Groups(q, k, v))
            continue
        yield row(name, name, Groups(q, k, v), when=not_copied)
        yield row(name, name, Same(q), when=copied)
        copies = at + f"linear_qkv.kv_{what}"
        yield row(copies, copies, Copied(k, v), when=copied)
    for what in ("q", "k"):
        name = at + f"{what}_layernorm.weight"
        yield row(name, name, Same(mine + f"attention.{what}_norm.weight"))


def _experts(layer: str, mine: str, stacked: bool) -> Iterator[Row]:
    """SequentialMLP's names; TEGroupedMLP's are read too."""
    one = mine + "experts.{e}."
    up, down = Blocks(one + "gate.weight", one + "up.weight"), Same(one + "down.weight")
    if stacked:
        base = layer + "mlp.experts.experts."
        yield Row(base + "linear_fc1.weight", up, stacked="le")
        yield Row(base + "linear_fc2.weight", down, stacked="le")
        return
    base, grouped = layer + "mlp.experts.local_experts.{e}.", layer + "mlp.experts."
    yield Row(base + "linear_fc1.weight", up, also=(grouped + "linear_fc1.weight{e}",))
    yield Row(base + "linear_fc2.weight", down, also=(grouped + "linear_fc2.weight{e}",))


def _heads(stacked: bool) -> Iterator[Row]:
    """BertModel's."""
    for what in _BOTH:
        yield Row(f"lm_head.dense.{what}", Same(f"head.dense.{what}"), on="last")
        yield Row(f"lm_head.layer_norm.{what}", Same(f"head.norm.{what}"), on="last")
    if not stacked:
        copy = Same("embedding.word.weight")
        yield Row("output_layer.weight", copy, on="last", when=tied_and_split)
    yield Row("output_layer.bias", Same("head.bias"), on="last")
    for what in _BOTH:
        yield Row(f"binary_head.{what}", Same(f"binary_head.{what}"), on="last")
    for what in _BOTH:
        yield Row(f"pooler.dense.{what}", Same(f"pooler.{what}"), on="last")


def _second(stacked: bool, spec: Spec) -> Iterator[Row]:
    """T5Model's decoder: a layer is GPTModel's, with cross-attention between attention and MLP."""

    def turned(row: Row) -> Row:
        names = tuple(name.replace("layers.{l}.", "decoder.{l}.") for name in row.how.names)
        return replace(row, how=row.how.of(names))

    layer = "decoder.layers." if stacked else "decoder.layers.{l}."
    own = [row for row in _rows(stacked, spec) if row.on == "layers"]
    before = [row for row in own if ".attention." in row.how.names[0]]
    cross, mine = layer + "cross_attention.", "decoder.{l}.cross."
    over: Literal["", "l"] = "l" if stacked else ""
    yield from map(turned, before)
    for what in _BOTH:
        yield Row(layer + f"pre_cross_attn_layernorm.{what}", Same(mine + f"norm.{what}"), stacked=over)
    yield from (Row(cross + f"linear_proj.{what}", Same(mine + f"out.{what}"), stacked=over) for what in _BOTH)
    yield from (Row(cross + f"linear_q.{what}", Same(mine + f"q.{what}"), stacked=over) for what in _BOTH)
    for what in _BOTH:
        yield Row(cross + f"linear_kv.{what}", Pairs(mine + f"k.{what}", mine + f"v.{what}"), stacked=over)
    yield from (turned(row) for row in own if row not in before and not row.expert)


def _t5(stacked: bool, spec: Spec) -> Iterator[Row]:
    """T5Model's. Two of its modules are known by a second name, and its checkpoints have both."""
    yield Row("embedding.word_embeddings.weight", Same("embedding.word.weight"), on="first")
    for key in ("embedding.position_embeddings.weight", "position_embeddings.weight"):
        yield Row(key, Same("embedding.position.weight"), on="first")
    relative = "relative_pos_emb.relative_attention_bias.weight"
    yield Row(f"encoder_{relative}", Same("relative_bias.weight"), on="first")
    yield Row(f"decoder_{relative}", Same("decoder_relative_bias.weight"), on="first")
    yield from (_encoders(row) for row in _rows(stacked, spec) if row.on == "layers" and not row.expert)
    for what in _BOTH:
        yield Row(f"encoder.final_layernorm.{what}", Same(f"final_norm.{what}"), on="between")
    yield from _second(stacked, spec)
    yield from (Row(f"decoder.final_layernorm.{w}", Same(f"decoder_norm.{w}"), on="last") for w in _BOTH)
    for key in ("lm_head.output_layer", "output_layer"):
        yield Row(f"{key}.weight", Same("head.weight"), on="last")
        yield Row(f"{key}.weight", Same("embedding.word.weight"), on="last", when=tied_and_split)
        yield Row(f"{key}.bias", Same("head.bias"), on="last")


def _encoders(row: Row) -> Row:
    """The same of an encoder's layer."""
    also = tuple(name.replace("decoder.", "encoder.", 1) for name in row.also)
    return replace(row, key=row.key.replace("decoder.", "encoder.", 1), also=also)


def _dialect(stacked: bool, spec: Spec) -> Dialect:
    """GPTModel's rows; for models with token types BertModel's, whose layers are an encoder's; T5Model's."""

    def of(kind: str, row: Row) -> Row:
        return replace(row, when=lambda model, layout: _kind(model) == kind and row.when(model, layout))

    own = [row for row in _rows(stacked, spec) if not row.key.startswith("output_layer")]
    rows = {
        "gpt": _rows(stacked, spec),
        "bert": (*map(_encoders, own), *_heads(stacked)),
        "t5": _t5(stacked, spec),
    }
    return tuple(of(kind, row) for kind, some in rows.items() for row in some)


def _kind(model: Model) -> str:
    return "t5" if model.decoder_layers else "bert" if model.token_types else "gpt"


def _transformer_engine(rows: Dialect) -> Iterator[Row]:
    """With its layers, the norm before experts stays a module: there is no linear layer for it to be a part of."""
    for row in rows:
        if "mlp.linear_fc1.layer_norm" not in row.key:
            yield row
            continue
        (plain,) = row.also
        yield _of_experts(row, False)
        yield _of_experts(replace(row, key=plain, also=(row.key,)), True)


def _of_experts(row: Row, wanted: bool) -> Row:
    """The row for models with experts alone, or without."""
    return replace(row, when=lambda model, layout: bool(model.experts) == wanted and row.when(model, layout))


DISTRIBUTED: Dialect = _dialect(stacked=True, spec="te")
DISTRIBUTED_TE: Dialect = tuple(_transformer_engine(DISTRIBUTED))
PER_RANK: Dialect = _dialect(stacked=False, spec="local")
PER_RANK_TE: Dialect = tuple(_transformer_engine(_dialect(stacked=False, spec="te")))
