"""The names of Megatron-LM before megatron-core, still written with --use-legacy-models.

Room checkpoint/ (leaf). The state is nested (`language_model`, `encoder`, ...); keys here are the path joined by dots.
Spellings changed over the years: `transformer` and `attention` before 2021, `layernorm` for `norm` before 2023. The
order of the rows of query_key_value depends on checkpoint_version. May import this room.
Written with checkpoint_version 3. Proof: tests/checkpoint/test_families.py, test_megatron_lm.py; none of
versions 0 to 2, for lack of a file that old.
"""

from __future__ import annotations

from collections.abc import Iterator

from nxdt_nemo.checkpoint.placement import (
    Blocks,
    Dialect,
    Groups,
    How,
    Row,
    Rows,
    Same,
    gated,
    not_gated,
    tied_and_split,
    untied,
)

__all__ = ["legacy"]

_ROOT = "language_model."


def _also(key: str) -> tuple[str, ...]:
    """Older spellings of a key."""
    names = [key.replace("_norm.", "_layernorm."), key]
    names += [name.replace(".self_attention.", ".attention.") for name in names]
    names += [name.replace("encoder.", "transformer.") for name in names]
    return tuple(dict.fromkeys(name for name in names if name != key))


def _rows(version: float) -> Iterator[Row]:
    layer, mine = _ROOT + "encoder.layers.{l}.", "layers.{l}."

    def row(key: str, how: How, **more: object) -> Row:
        return Row(key, how, also=_also(key), **more)  # type: ignore[arg-type]

    yield Row(_ROOT + "embedding.word_embeddings.weight", Same("embedding.word.weight"), on="first")
    yield Row(_ROOT + "embedding.position_embeddings.weight", Same("embedding.position.weight"), on="first")
    yield Row(_ROOT + "embedding.tokentype_embeddings.weight", Same("embedding.token_type.weight"), on="first")
    both = ("weight", "bias")  # in the order of the modules, by which optimizers number parameters
    yield from (row(layer + f"input_norm.{what}", Same(mine + f"attention.norm.{what}")) for what in both)
    for what in both:
        fused = [mine + f"attention.{one}.{what}" for one in "qkv"]
        yield row(layer + f"self_attention.query_key_value.{what}", _fuse(fused, version))
    yield from (row(layer + f"self_attention.dense.{what}", Same(mine + f"attention.out.{what}")) for what in both)
    yield from (row(layer + f"post_attention_norm.{what}", Same(mine + f"mlp.norm.{what}")) for what in both)
    fc1 = layer + "mlp.dense_h_to_4h.weight"
    yield row(fc1, Blocks(mine + "mlp.gate.weight", mine + "mlp.up.weight"), when=gated)
    yield row(fc1, Same(mine + "mlp.up.weight"), when=not_gated)
    yield row(layer + "mlp.dense_h_to_4h.bias", Same(mine + "mlp.up.bias"))
    yield from (row(layer + f"mlp.dense_4h_to_h.{what}", Same(mine + f"mlp.down.{what}")) for what in both)
    for what in ("weight", "bias"):
        yield row(_ROOT + f"encoder.final_norm.{what}", Same(f"final_norm.{what}"), on="last")
        yield row(f"lm_head.norm.{what}", Same(f"head.norm.{what}"), on="last")
        yield Row(f"lm_head.dense.{what}", Same(f"head.dense.{what}"), on="last")
        yield Row(_ROOT + f"pooler.dense.{what}", Same(f"pooler.{what}"), on="last")
        yield Row(f"binary_head.{what}", Same(f"binary_head.{what}"), on="last")
    yield Row("lm_head.bias", Same("head.bias"), on="last")
    yield Row(_ROOT + "output_layer.weight", Same("head.weight"), on="last", when=untied)
    copy = Same("embedding.word.weight")
    yield Row("word_embeddings_for_head.weight", copy, on="last", when=tied_and_split)


def _fuse(names: list[str], version: float) -> How:
    if version < 1:
        return Blocks(*names)
    return Rows(*names) if version < 2 else Groups(*names)


def legacy(version: float) -> Dialect:
    """The rows of a checkpoint of this checkpoint_version (0, 1.0, 2.0, 3.0)."""
    return tuple(_rows(version))
