"""Enumerations of apex.transformer.

Room apex/. As in Apex they are not the enumerations of megatron-core, which its own code compares with.
Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

import enum

__all__ = ["AttnMaskType", "AttnType", "LayerType", "ModelType"]


class LayerType(enum.Enum):
    """Which half of a model a layer belongs to."""

    encoder = 1
    decoder = 2


class AttnType(enum.Enum):
    """What a layer attends to."""

    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    """Where an attention mask comes from: padding (given) or causal (implied)."""

    padding = 1
    causal = 2


class ModelType(enum.Enum):
    """One stack of layers or two."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
