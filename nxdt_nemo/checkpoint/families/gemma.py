"""Gemma (the first): Llama with GEGLU, tied embeddings scaled by sqrt(H), and norm weights stored as w - 1.

Room checkpoint/ (leaf). Megatron stores such norms alike (`apply_layernorm_1p`). May import this room.
Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.checkpoint.families import llama
from nxdt_nemo.checkpoint.families.family import Config, Family
from nxdt_nemo.checkpoint.model import Model

__all__ = ["FAMILY"]


def _from_hf(config: Config) -> Model:
    return llama.from_hf(
        config,
        family="gemma",
        activation="geglu",
        norm_from_one=True,
        tied=bool(config.get("tie_word_embeddings", True)),
        embedding_scale=float(config["hidden_size"]) ** 0.5,
        head_size=config.get("head_dim") or 256,
    )


def _to_hf(model: Model) -> dict[str, Any]:
    others = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
    found = llama.to_hf(model, **others)
    return {key: value for key, value in found.items() if key not in ("mlp_bias", "rope_scaling")}


def _is_it(model: Model) -> bool:
    return model.activation == "geglu" and model.norm == "RMSNorm" and model.norm_from_one and not model.experts


FAMILY = Family("gemma", ("gemma",), llama.FAMILY.rows, _from_hf, _to_hf, _is_it)
