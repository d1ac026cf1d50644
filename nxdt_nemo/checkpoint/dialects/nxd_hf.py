"""Hugging Face's names as neuronx-distributed (NxD) has them, with copies of key and value heads.

Room checkpoint/ (leaf). With more ranks than key-value heads each head has `multiplier` copies, one in each of
groups * multiplier slots, and the queries that go with a copy are in the same slot (modules/qkv_linear.py,
scripts/checkpoint_converter.py in neuronx_distributed 0.12 and later):
    trn1   heads 0 1 .. n-1, then 0 1 .. n-1 again
    trn2   heads 0 0 .. 1 1 ..
Four forms of attention: qkv_proj.weight_{q,k,v} (GQAQKVColumnParallelLinear), qkv_proj.weight_qkv (its fuse_qkv),
qkv_proj.weight (multi-head, [q; k; v]), {q,k,v}_proj.weight. May import this room.
Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nxdt_nemo.checkpoint.dialects.nemo_legacy import moe
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Blocks, Dialect, How, Row, Same, Segment, untied
from nxdt_nemo.errors import LayoutError

__all__ = ["Attention", "Copies", "Form", "form_of", "nxd_hf"]

Form = Literal["three", "fused", "stride", "separate"]
Hardware = Literal["trn1", "trn2"]


@dataclass(frozen=True)
class Copies:
    """How often each key-value head is there, and in which order of slots."""

    multiplier: int = 1
    hardware: Hardware = "trn1"

    def slots(self, model: Model, rank: int, ranks: int) -> list[tuple[int, int]]:
        """(head, number of the copy) of each slot of a rank. Raises LayoutError if slots are not whole."""
        count = model.groups * self.multiplier
        if count % ranks or model.heads % count:
            reason = f"{model.groups} key-value heads x {self.multiplier} copies for {model.heads} heads on tp={ranks}"
            good = [n for n in range(1, model.heads + 1) if model.groups * n % ranks == 0]
            good = [n for n in good if model.heads % (model.groups * n) == 0]
            fix = f"use kv_multiplier={good[0]}" if good else "use a smaller tp"
            raise LayoutError(f"cannot place {reason}", fix=fix)
        mine = range(rank * (count // ranks), (rank + 1) * (count // ranks))
        if self.hardware == "trn2":
            return [(slot // self.multiplier, slot % self.multiplier) for slot in mine]
        return [(slot % model.groups, slot // model.groups) for slot in mine]


@dataclass(frozen=True)
class Attention(How):
    """[queries; keys; values] of a rank's slots, or some of the three.

    parts  which: a letter for each name
    """

    parts: str = "qkv"
    copies: Copies = field(default=Copies())

    def segments(self, names: Sequence[str], model: Model, rank: int, ranks: int) -> list[Segment]:
        slots, size = self.copies.slots(model, rank, ranks), model.head_size
        block = model.heads * size // (model.groups * self.copies.multiplier)
        found = []
        for name, part in zip(names, self.parts, strict=True):
            for head, copy in slots:
                if part == "q":
                    found.append(Segment(name, (head * self.copies.multiplier + copy) * block, block))
                else:
                    found.append(Segment(name, head * size, size))
        return found


def form_of(keys: Sequence[str]) -> Form:
    """The form of attention that a rank's keys have."""
    ends = {key.partition(".self_attn.")[2] for key in keys}
    if "qkv_proj.weight_q" in ends:
        return "three"
    if "qkv_proj.weight_qkv" in ends:
        return "fused"
    return "stride" if "qkv_proj.weight" in ends else "separate"


def _attention(at: str, mine: str, form: Form, copies: Copies) -> Iterator[Row]:
    for what in ("weight", "bias"):
        names = tuple(mine + f"attention.{one}.{what}" for one in "qkv")
        if form in ("fused", "stride"):
            end = f"{what}_qkv" if form == "fused" else what
            yield Row(at + f"qkv_proj.{end}", Attention(names, parts="qkv", copies=copies))
            continue
        for one, name in zip("qkv", names, strict=True):
            key = f"qkv_proj.{what}_{one}" if form == "three" else f"{one}_proj.{what}"
            yield Row(at + key, Attention((name,), parts=one, copies=copies))
    for what in ("q", "k"):
        yield Row(at + f"{what}_norm.weight", Same(mine + f"attention.{what}_norm.weight"))
    yield Row(at + "o_proj.weight", Attention((mine + "attention.out.weight",), parts="q", copies=copies))


def _rows(form: Form, copies: Copies) -> Iterator[Row]:
    layer, mine = "model.layers.{l}.", "layers.{l}."
    yield Row("model.embed_tokens.weight", Same("embedding.word.weight"), on="first")
    yield from _attention(layer + "self_attn.", mine, form, copies)
    yield Row(layer + "mlp.gate_up_proj.weight", Blocks(mine + "mlp.gate.weight", mine + "mlp.up.weight"))
    yield Row(layer + "mlp.down_proj.weight", Same(mine + "mlp.down.weight"))
    yield from moe(layer + "mlp.", mine)
    yield Row(layer + "input_layernorm.weight", Same(mine + "attention.norm.weight"))
    yield Row(layer + "post_attention_layernorm.weight", Same(mine + "mlp.norm.weight"))
    yield Row("model.norm.weight", Same("final_norm.weight"), on="last")
    yield Row("lm_head.weight", Same("head.weight"), on="last", when=untied)


def nxd_hf(form: Form, copies: Copies) -> Dialect:
    """The rows of a rank's file, layers by global numbers."""
    return tuple(_rows(form, copies))
