"""Qwen2 and Qwen2.5: Llama with biases of query, key and value.

Room checkpoint/ (leaf). May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.checkpoint.families import llama
from nxdt_nemo.checkpoint.families.family import Config, Family
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Row, Same
from nxdt_nemo.errors import UserError

__all__ = ["FAMILY"]

_BIASES = tuple(
    Row(f"model.layers.{{l}}.self_attn.{one}_proj.bias", Same(f"layers.{{l}}.attention.{one}.bias")) for one in "qkv"
)


def _from_hf(config: Config) -> Model:
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window and (first := config.get("max_window_layers", 28)):
        reason = f"use_sliding_window from layer {first} on (max_window_layers), and one window is for all layers here"
        raise UserError(reason, place="config.json", fix="not supported")
    # Files name a window that use_sliding_window turns off: it is kept beside the one that counts.
    model = llama.from_hf(config, family="qwen2", qkv_bias=True, window=window)
    return model.with_(extra={**model.extra, "sliding_window": config.get("sliding_window")})


def _to_hf(model: Model) -> dict[str, Any]:
    others = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": model.window is not None,
    }
    left = ("attention_bias", "mlp_bias", "head_dim")
    return {key: value for key, value in llama.to_hf(model, **others).items() if key not in left}


def _is_it(model: Model) -> bool:
    return model.qkv_bias and llama.plain(model.with_(qkv_bias=False))


FAMILY = Family("qwen2", ("qwen2",), (*llama.FAMILY.rows, *_BIASES), _from_hf, _to_hf, _is_it)
