"""T5 as Megatron has it: an encoder, a decoder with cross-attention, learned or relative positions, one vocabulary.

Room checkpoint/ (leaf). No model of Hugging Face's computes the same (its T5 does not scale attention scores), so rows
are the logical tensors by their own names, and config.json is refused both ways. May import this room.
Proof: tests/checkpoint/test_t5.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from nxdt_nemo.checkpoint.families.family import Family
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Row, Same
from nxdt_nemo.errors import UserError

__all__ = ["FAMILY"]

When = Callable[[Model, Layout], bool]


def _has(model: Model, name: str) -> bool:
    """Whether a model has a tensor, by the last words of its name."""
    tensor, what = name.split(".")[-2:]
    if what == "bias" and name not in ("head.bias",):
        if tensor.endswith("norm"):
            return model.norm == "LayerNorm"
        return model.qkv_bias if tensor in "qkv" and ".attention." in name else model.bias
    return {
        "embedding.position.weight": model.learned_positions,
        "relative_bias.weight": model.relative_buckets > 0,
        "decoder_relative_bias.weight": model.relative_buckets > 0,
        "head.weight": not model.tied,
        "head.bias": model.tied,
    }.get(name, model.gated or tensor != "gate")


def _names() -> Iterator[str]:
    yield from ("embedding.word.weight", "embedding.position.weight")
    yield from ("relative_bias.weight", "decoder_relative_bias.weight")
    for layer, kinds in (("layers.{l}.", ("attention",)), ("decoder.{l}.", ("attention", "cross"))):
        for what in ("weight", "bias"):
            for kind in kinds:
                yield from (f"{layer}{kind}.{one}.{what}" for one in ("norm", "q", "k", "v", "out"))
            yield from (f"{layer}mlp.{one}.{what}" for one in ("norm", "up", "down"))
        yield layer + "mlp.gate.weight"
    for what in ("weight", "bias"):
        yield from (f"final_norm.{what}", f"decoder_norm.{what}", f"head.{what}")


def _row(name: str) -> Row:
    return Row(name, Same(name), when=lambda model, layout: _has(model, name))


def _no_model(*_: Any) -> NoReturn:
    reason = "transformers has no model that computes what Megatron's T5 does"
    raise UserError(reason, place="--to hf", fix="use torch_dist, torch or nemo")


FAMILY = Family("t5", (), tuple(map(_row, _names())), _no_model, _no_model, lambda model: model.decoder_layers > 0)
