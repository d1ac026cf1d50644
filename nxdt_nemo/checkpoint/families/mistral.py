"""Mistral: Llama with a sliding window of attention.

Room checkpoint/ (leaf). May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.checkpoint.families import llama
from nxdt_nemo.checkpoint.families.family import Config, Family
from nxdt_nemo.checkpoint.model import Model

__all__ = ["FAMILY"]


def _from_hf(config: Config) -> Model:
    return llama.from_hf(config, family="mistral", window=config.get("sliding_window"))


def _to_hf(model: Model) -> dict[str, Any]:
    others = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": model.window}
    return {
        key: value for key, value in llama.to_hf(model, **others).items() if key not in ("attention_bias", "mlp_bias")
    }


def _is_it(model: Model) -> bool:
    return llama.plain(model) and model.window is not None


FAMILY = Family("mistral", ("mistral",), llama.FAMILY.rows, _from_hf, _to_hf, _is_it)
