"""What a model is, in numbers: the part of a checkpoint that is neither tensors nor training state.

Room checkpoint/ (leaf). Every format's arguments become a Model, and every Model any format's arguments.
May import the standard library and nxdt_nemo.errors. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nxdt_nemo.errors import UserError

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """A transformer's sizes and switches. Letters are those of the shapes in `tensors.py`.

    vocab         rows that mean a token
    padded_vocab  V, rows that are stored; 0 for as many as `vocab`
    tied          one tensor for the embedding and the output layer
    norm_from_one stored norm weights are w - 1 (Gemma; `apply_layernorm_1p`)
    norm_after    a sublayer's sum is normalised, and the norm is what goes on (BERT)
    window        keys that a query sees (Mistral's sliding_window), None for all
    extra         keys of the source's configuration that no format of ours reads, kept for a round trip
    """

    family: str
    layers: int  # L
    hidden: int  # H
    heads: int
    groups: int  # of query heads, each with one key and value head
    head_size: int  # D
    ffn: int  # F
    vocab: int
    positions: int  # P, longest sequence
    padded_vocab: int = 0
    tied: bool = False
    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_eps: float = 1e-5
    norm_from_one: bool = False
    norm_after: bool = False
    activation: Literal["swiglu", "geglu", "gelu", "openai_gelu", "squared_relu", "relu"] = "swiglu"
    bias: bool = False  # linear layers, without query, key and value
    qkv_bias: bool = False
    qk_norm: bool = False
    learned_positions: bool = False
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: Mapping[str, Any] | None = None
    window: int | None = None
    experts: int = 0  # E
    experts_per_token: int = 2
    expert_ffn: int = 0
    decoder_layers: int = 0  # T5, whose encoder has `layers`
    relative_buckets: int = 0  # T5: of distances, each with a bias; 0 for other positions
    relative_distance: int = 128  # T5: the distance from which on all are in one bucket
    token_types: int = 0  # BERT
    pooled: bool = False  # BERT: pooler and next-sentence head
    embedding_scale: float | None = None  # Gemma: sqrt(hidden)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """True if the MLP has a gate beside its up-projection."""
        return self.activation in ("swiglu", "geglu")

    def sizes(self) -> dict[str, int]:
        """The letters of shapes as numbers."""
        return {
            "V": self.padded_vocab or self.vocab,
            "H": self.hidden,
            "Q": self.heads * self.head_size,
            "K": self.groups * self.head_size,
            "D": self.head_size,
            "F": self.ffn,
            "M": self.expert_ffn or self.ffn,
            "E": self.experts,
            "P": self.positions,
            "T": self.token_types,
            "R": self.relative_buckets,
            "N": self.heads,
            "1": 1,
            "2": 2,
        }

    def check(self, place: str) -> Model:
        """Itself. Raises UserError naming `place` if its numbers contradict each other."""
        for name in ("layers", "hidden", "heads", "groups", "head_size", "vocab"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", place=place, fix="give the model's real size")
        if self.heads % self.groups:
            reason = f"{self.groups} key-value heads do not divide {self.heads} attention heads"
            raise UserError(reason, place=place, fix="correct one of the two")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UserError(f"{self.experts_per_token} of {self.experts} experts a token", place=place)
        return self

    def with_(self, **changes: Any) -> Model:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)
