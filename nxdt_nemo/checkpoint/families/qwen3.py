"""Qwen3: Llama with norms of query and key heads, and a head size of its own.

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

_NORMS = tuple(
    Row(f"model.layers.{{l}}.self_attn.{one}_norm.weight", Same(f"layers.{{l}}.attention.{one}_norm.weight"))
    for one in "qk"
)


def _from_hf(config: Config) -> Model:
    if config.get("attention_bias"):
        raise UserError(
            "attention_bias is true, which no Qwen3 is", place="config.json", fix="use the model's own file"
        )
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    model = llama.from_hf(config, family="qwen3", qk_norm=True, window=window, head_size=config.get("head_dim") or 128)
    return model.with_(extra={**model.extra, "sliding_window": config.get("sliding_window")})


def _to_hf(model: Model) -> dict[str, Any]:
    others = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": model.window is not None,
    }
    return {key: value for key, value in llama.to_hf(model, **others).items() if key != "mlp_bias"}


def _is_it(model: Model) -> bool:
    return model.qk_norm and llama.plain(model.with_(qk_norm=False))


FAMILY = Family("qwen3", ("qwen3",), (*llama.FAMILY.rows, *_NORMS), _from_hf, _to_hf, _is_it)
