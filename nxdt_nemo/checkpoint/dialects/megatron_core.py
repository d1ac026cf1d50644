"""megatron-core 0.13's names (GPTModel), for its distributed checkpoints and for per-rank files.

Room checkpoint/ (leaf). Layer specs differ in the names of norms: TransformerEngine fuses them into the linear layer
that follows, `local` has modules of their own; distributed checkpoints have TransformerEngine's names with either.
May import this room. Proof: tests/checkpoint/test_families.py, test_resume.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from nxdt_nemo.checkpoint.placement import Blocks, Dialect, Groups, Row, Same, gated, not_gated, tied_and_split, untied

__all__ = ["DISTRIBUTED", "PER_RANK", "PER_RANK_TE"]

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
    yield from _attention(row, mine, spec)
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


def _attention(row: Callable[..., Row], mine: str, spec: Spec) -> Iterator[Row]:
    """In the order of the modules: with TransformerEngine the norm is a part of linear_qkv."""
    at = "self_attention."
    norm = [
        row(f"input_layernorm.{w}", at + f"linear_qkv.layer_norm_{w}", Same(mine + f"attention.norm.{w}"))
        for w in _BOTH
    ]
    out = [row(at + f"linear_proj.{w}", at + f"linear_proj.{w}", Same(mine + f"attention.out.{w}")) for w in _BOTH]
    yield from (*out, *norm) if spec == "te" else (*norm, *out)
    for what in _BOTH:
        name = at + f"linear_qkv.{what}"
        yield row(name, name, Groups(*(mine + f"attention.{one}.{what}" for one in "qkv")))
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


def _dialect(stacked: bool, spec: Spec) -> Dialect:
    """GPTModel's rows, and for models with token types BertModel's, whose layers are an encoder's."""

    def of(bert: bool, row: Row) -> Row:
        return replace(row, when=lambda model, layout: bool(model.token_types) == bert and row.when(model, layout))

    def renamed(row: Row) -> Row:
        also = tuple(name.replace("decoder.", "encoder.", 1) for name in row.also)
        return replace(row, key=row.key.replace("decoder.", "encoder.", 1), also=also)

    own = [row for row in _rows(stacked, spec) if not row.key.startswith("output_layer")]
    bert = [*map(renamed, own), *_heads(stacked)]
    return (*(of(False, row) for row in _rows(stacked, spec)), *(of(True, row) for row in bert))


DISTRIBUTED: Dialect = _dialect(stacked=True, spec="te")
PER_RANK: Dialect = _dialect(stacked=False, spec="local")
PER_RANK_TE: Dialect = _dialect(stacked=False, spec="te")
