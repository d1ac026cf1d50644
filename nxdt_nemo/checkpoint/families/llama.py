"""Llama 2, 3 and 3.1: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases.

Room checkpoint/ (leaf). May import this room. The base of the families that are like it.
Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.checkpoint.families.family import Config, Family, need
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Row, Same
from nxdt_nemo.errors import UserError

__all__ = ["ATTENTION", "ENDS", "FAMILY", "MLP", "from_hf", "plain", "to_hf", "untied"]


def untied(model: Model, layout: Layout) -> bool:
    """True if the output layer has a tensor of its own."""
    return not model.tied


LAYER, HF = "layers.{l}.", "model.layers.{l}."
ENDS = (
    Row("model.embed_tokens.weight", Same("embedding.word.weight"), on="first"),
    Row("model.norm.weight", Same("final_norm.weight"), on="last"),
    Row("lm_head.weight", Same("head.weight"), on="last", when=untied),
)
ATTENTION = (
    Row(HF + "input_layernorm.weight", Same(LAYER + "attention.norm.weight")),
    Row(HF + "self_attn.q_proj.weight", Same(LAYER + "attention.q.weight")),
    Row(HF + "self_attn.k_proj.weight", Same(LAYER + "attention.k.weight")),
    Row(HF + "self_attn.v_proj.weight", Same(LAYER + "attention.v.weight")),
    Row(HF + "self_attn.o_proj.weight", Same(LAYER + "attention.out.weight")),
    Row(HF + "post_attention_layernorm.weight", Same(LAYER + "mlp.norm.weight")),
)
MLP = (
    Row(HF + "mlp.gate_proj.weight", Same(LAYER + "mlp.gate.weight")),
    Row(HF + "mlp.up_proj.weight", Same(LAYER + "mlp.up.weight")),
    Row(HF + "mlp.down_proj.weight", Same(LAYER + "mlp.down.weight")),
)
# Keys of config.json that from_hf reads; all others are kept in Model.extra.
_READ = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling tie_word_embeddings "
    "torch_dtype hidden_act attention_bias mlp_bias sliding_window transformers_version".split()
)


def from_hf(config: Config, **features: Any) -> Model:
    """A Model; features are what makes a relative of Llama differ from it."""
    hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    model = Model(
        family="llama",
        layers=need(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        ffn=need(config, "intermediate_size"),
        vocab=need(config, "vocab_size"),
        positions=need(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_base=float(config.get("rope_theta") or 10000.0),
        rope_scaling=config.get("rope_scaling"),
        extra={key: value for key, value in config.items() if key not in _READ},
    )
    return model.with_(**features)


def to_hf(model: Model, **others: Any) -> dict[str, Any]:
    """config.json without torch_dtype, which the writer knows."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "mlp_bias": False,
        **others,
        **model.extra,
    }


def plain(model: Model) -> bool:
    """True for what Llama and its relatives share, without what any of them adds."""
    adds = model.bias or model.qkv_bias or model.qk_norm or model.experts or model.learned_positions
    return not adds and model.activation == "swiglu" and model.norm == "RMSNorm" and not model.norm_from_one


def _from_hf(config: Config) -> Model:
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UserError(f"{name} is true, which no released Llama is", place="config.json", fix="not supported")
    return from_hf(config)


def _is_it(model: Model) -> bool:
    return plain(model) and model.window is None


FAMILY = Family("llama", ("llama",), (*ENDS, *ATTENTION, *MLP), _from_hf, to_hf, _is_it)
