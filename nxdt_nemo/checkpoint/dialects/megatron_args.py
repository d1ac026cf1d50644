"""Megatron-LM's arguments as a Model and back.

Room checkpoint/ (leaf). Names are those of megatron/training/arguments.py (core_v0.13.1), whose Namespace is in every
checkpoint. Where a tensor tells the same, the tensor is believed and a conflict is an error (formats/megatron.py).
May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdt_nemo.checkpoint.dtypes import BFLOAT16, FLOAT16, DType
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.errors import UserError

__all__ = ["from_args", "layout_of", "positions_of", "relative_of", "to_args", "window_of"]

_SQUARED, _OPENAI = "squared_relu", "openai_gelu"
# What we add to the Namespace: a vocabulary's true size, which Megatron's own `vocab_size` is not (NullTokenizer).
TRUE_VOCAB = "nxdt_vocab_size"
# And token types, which Megatron knows by the script that it runs.
TOKEN_TYPES = "nxdt_token_types"


def from_args(args: Mapping[str, Any], place: str) -> Model:
    """A Model without a family. Raises UserError naming the first argument that is missing."""

    def size(name: str, *otherwise: int | None) -> int:
        for value in (args.get(name), *otherwise):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        raise UserError(
            f"its arguments have no {name}", place=place, fix="give the model's: --model-config config.json"
        )

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    groups = size("num_query_groups", heads) if args.get("group_query_attention") else heads
    padded = size("padded_vocab_size", args.get("vocab_size"))
    return Model(
        family="",
        layers=size("num_layers"),
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_size=size("kv_channels", hidden // heads),
        ffn=size("ffn_hidden_size", 4 * hidden),
        vocab=size(TRUE_VOCAB, padded),
        padded_vocab=padded,
        positions=size("max_position_embeddings", args.get("seq_length")),
        tied=not args.get("untie_embeddings_and_output_weights", False),
        norm=args.get("normalization", "LayerNorm"),
        norm_eps=float(args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5),
        norm_from_one=bool(args.get("apply_layernorm_1p", False)),
        norm_after=bool(args.get("apply_residual_connection_post_layernorm", False)),
        activation=_activation(args),
        bias=bool(args.get("add_bias_linear", True)),
        qkv_bias=bool(args.get("add_qkv_bias", False) or args.get("add_bias_linear", True)),
        qk_norm=bool(args.get("qk_layernorm", False)),
        learned_positions=args.get("position_embedding_type", "learned_absolute") == "learned_absolute",
        rope_base=float(args.get("rotary_base") or 10000.0),
        rope_fraction=float(args.get("rotary_percent") or 1.0),
        rope_scaling=_scaling(args),
        relative_distance=int(args.get("relative_attention_max_distance") or 128),
        window=_window(args),
        token_types=_token_types(args),
        pooled=_token_types(args) > 0 and bool(args.get("bert_binary_head", True)),
        experts=args.get("num_experts") or 0,
        experts_per_token=args.get("moe_router_topk") or 2,
        expert_ffn=(args.get("moe_ffn_hidden_size") or size("ffn_hidden_size", 4 * hidden))
        if args.get("num_experts")
        else 0,
    )


def _activation(args: Mapping[str, Any]) -> Any:
    if args.get("swiglu"):
        return "swiglu"
    if args.get("geglu") or args.get("gated_linear_unit"):
        return "geglu"
    return _SQUARED if args.get(_SQUARED) else _OPENAI if args.get(_OPENAI) else "gelu"


def _token_types(args: Mapping[str, Any]) -> int:
    """2 for a BERT. Megatron's arguments are those of every model; what says so is ours, or a BERT's own spelling."""
    return int(args.get(TOKEN_TYPES) or 0)


def _scaling(args: Mapping[str, Any]) -> dict[str, Any] | None:
    if not args.get("use_rope_scaling"):
        return None
    return {  # the constants of megatron.core's RotaryEmbedding._apply_scaling
        "rope_type": "llama3",
        "factor": float(args.get("rope_scaling_factor") or 8.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def positions_of(model: Model) -> str:
    """Megatron's position_embedding_type."""
    if model.learned_positions:
        return "learned_absolute"
    return "relative" if model.relative_buckets else "rope"


def relative_of(model: Model) -> dict[str, int]:
    """Megatron's arguments of relative positions, NeMo's too; none for others."""
    if not model.relative_buckets:
        return {}
    return {
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
    }


def window_of(model: Model) -> list[int] | None:
    """`window_size`, megatron-core's and TransformerEngine's: keys before and after the query's own, left uncounted."""
    return [model.window - 1, 0] if model.window else None


def _window(args: Mapping[str, Any]) -> int | None:
    bounds = args.get("window_size")
    return int(bounds[0]) + 1 if isinstance(bounds, (list, tuple)) and bounds and bounds[0] >= 0 else None


def layout_of(args: Mapping[str, Any]) -> Layout:
    """The layout that the arguments say."""
    encoder = args.get("encoder_pipeline_model_parallel_size") or 0
    pp = args.get("transformer_pipeline_model_parallel_size") or args.get("pipeline_model_parallel_size") or 1
    if encoder:
        pp = encoder + (args.get("pipeline_model_parallel_size") or 1)
    tp = args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or 1
    first, last = args.get("decoder_first_pipeline_num_layers"), args.get("decoder_last_pipeline_num_layers")
    vpp = args.get("virtual_pipeline_model_parallel_size") or 1
    layers, stages = int(args.get("num_layers") or 0), _stages(args)
    if not stages and (first or last) and pp > 1:
        middle = pp - bool(first) - bool(last)
        each = (layers - (first or 0) - (last or 0)) // middle if middle else 0
        stages = (*([first] if first else []), *[each] * middle, *([last] if last else []))
    return Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=args.get("expert_model_parallel_size") or 1,
        etp=args.get("expert_tensor_parallel_size") or tp,
        stages=stages,
        encoder=encoder,
    )


def _stages(args: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers of each stage as a layout string has them: E|t|tt|tL."""
    said = args.get("pipeline_model_parallel_layout")
    if not isinstance(said, str):
        return ()
    if set(said) - set("EtL|"):
        raise UserError(f"the pipeline layout {said} is not understood", fix="write it without multiplications")
    return tuple(stage.count("t") for stage in said.split("|"))


def to_args(model: Model, layout: Layout, dtype: DType) -> dict[str, Any]:
    """The arguments that say what the model is, and how it is cut."""
    scaling = model.rope_scaling or {}
    return {
        "num_layers": model.decoder_layers or model.layers,
        "encoder_num_layers": model.layers,
        "decoder_num_layers": model.decoder_layers or None,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_size,
        "group_query_attention": model.groups != model.heads,
        "num_query_groups": model.groups if model.groups != model.heads else 1,
        "max_position_embeddings": model.positions,
        "seq_length": model.positions,
        "encoder_seq_length": model.positions,
        "position_embedding_type": positions_of(model),
        **relative_of(model),
        "add_position_embedding": True,  # what --position-embedding-type rope leaves it at; loaders compare
        "rotary_base": int(model.rope_base),
        "rotary_percent": model.rope_fraction,
        "use_rope_scaling": bool(scaling),
        "rope_scaling_factor": float(scaling.get("factor", 8.0)),
        "normalization": model.norm,
        "norm_epsilon": model.norm_eps,
        "apply_layernorm_1p": model.norm_from_one,
        "swiglu": model.activation == "swiglu",
        "geglu": model.activation == "geglu",
        "squared_relu": model.activation == _SQUARED,
        "openai_gelu": model.activation == _OPENAI,
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.qkv_bias and not model.bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tied,
        "vocab_size": model.vocab,
        "padded_vocab_size": model.padded_vocab or model.vocab,
        "num_experts": model.experts or None,
        "moe_router_topk": model.experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn or None,
        "moe_layer_freq": 1,
        "params_dtype": dtype,
        "bf16": dtype == BFLOAT16,
        "fp16": dtype == FLOAT16,
        **({"window_size": tuple(bounds)} if (bounds := window_of(model)) else {}),
        **layout_args(layout),
        "apply_residual_connection_post_layernorm": model.norm_after,
        "bert_binary_head": model.pooled,
        TOKEN_TYPES: model.token_types,
        TRUE_VOCAB: model.vocab,
    }


def layout_args(layout: Layout) -> dict[str, Any]:
    """The sizes of a layout as arguments."""
    middle = layout.stages[1:-1]
    ends = bool(layout.stages) and layout.vpp == 1 and 0 not in layout.stages and len(set(middle)) < 2
    written = "|".join("t" * count for count in layout.stages)
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp - layout.encoder,
        "transformer_pipeline_model_parallel_size": layout.pp - layout.encoder,
        "encoder_pipeline_model_parallel_size": layout.encoder,
        "encoder_tensor_model_parallel_size": layout.tp if layout.encoder else 0,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
        "context_parallel_size": 1,
        "decoder_first_pipeline_num_layers": layout.stages[0] if ends else None,
        "decoder_last_pipeline_num_layers": layout.stages[-1] if ends else None,
        "pipeline_model_parallel_layout": f"E{written}L" if layout.stages and not ends else None,
    }
