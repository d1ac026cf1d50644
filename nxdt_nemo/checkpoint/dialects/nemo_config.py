"""NeMo's model configuration, 1.x YAML and 2.0 dataclasses, as Megatron's arguments and back.

Room checkpoint/ (leaf). megatron_args.py makes a Model of the arguments; what a YAML leaves open (the vocabulary, which
is the tokenizer's) is taken from the tensors. May import this room.
Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import gcd
from typing import Any

from nxdt_nemo.checkpoint.dialects.megatron_args import TRUE_VOCAB, positions_of, relative_of, window_of
from nxdt_nemo.checkpoint.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from nxdt_nemo.checkpoint.io.unpickle import Inert
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model

__all__ = [
    "SCALING",
    "TEMPLATE",
    "VOCABULARY",
    "args_of",
    "config_of",
    "generation",
    "of_hyper_parameters",
    "plain_config",
    "structured",
    "t5_config",
    "two_args",
    "two_config",
    "two_context",
    "two_model",
]

SCALING = "nxdt_rope_scaling"  # what Megatron has no argument for
# NeMo 1.x key: Megatron's argument. Values are the same.
_SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "encoder_seq_length": "seq_length",
    "layernorm_epsilon": "norm_epsilon",
    "bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "rotary_base": "rotary_base",
    "rotary_percentage": "rotary_percent",
    "scale_positional_embedding": "use_rope_scaling",
    "scale_factor": "rope_scaling_factor",
    "window_size": "window_size",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    TRUE_VOCAB: TRUE_VOCAB,
}
# What NeMo takes for keys that are not there.
_DEFAULTS = {"position_embedding_type": "learned_absolute", "bias": True, "layernorm_epsilon": 1e-5}
_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")
_WHOLE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels max_position_embeddings encoder_seq_length "
    "num_query_groups num_moe_experts moe_router_topk moe_ffn_hidden_size"
).split()


def plain_config(value: Any, root: Any = None) -> Any:
    """OmegaConf's objects out of a pickle, or YAML's, as dicts and lists; `${a.b}` replaced by what is there.

    Other interpolations (`${multiply:...}`) stay text: they need NeMo's resolvers.
    """
    plain = _plain(value)
    return _resolved(plain, plain if root is None else root, 0)


def of_hyper_parameters(found: Any) -> dict[str, Any]:
    """The model's configuration out of Lightning's `hyper_parameters`; {} if there is none."""
    plain = plain_config(found)
    config = plain.get("cfg", plain) if isinstance(plain, dict) else None
    return plain_config(config) if isinstance(config, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:
            return _plain(state["_content"])
        if "_val" in state:
            return _plain(state["_val"])
        if items := value.__dict__["items"]:  # a subclass of dict, such as Lightning's AttributeDict
            return {str(key): _plain(item) for key, item in items}
        return None if not state else {str(key): _plain(item) for key, item in state.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _resolved(value: Any, root: Any, depth: int) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(item, root, depth) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, root, depth) for item in value]
    if isinstance(value, str) and depth < 8 and (match := _INTERPOLATION.fullmatch(value)):
        found = root
        for name in match[1].split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return value if found is None else _resolved(found, root, depth + 1)
    return value


def args_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for a `model:` section. Keys that are not there are left out, or NeMo's defaults."""
    config = {**_DEFAULTS, **{key: value for key, value in _joined(config).items() if value is not None}}
    args = {theirs: config[ours] for ours, theirs in _SAME.items() if ours in config}
    for ours in _WHOLE:
        name = _SAME.get(ours, ours)
        if isinstance(args.get(name), str):  # an interpolation that was not resolved
            del args[name]
    # NNM and NxDT say num_kv_heads.
    groups = config.get("num_query_groups") or config.get("num_kv_heads")
    heads = config.get("num_attention_heads")
    args["group_query_attention"] = bool(groups) and groups != heads
    args["num_query_groups"] = groups or 1
    kind = str(config.get("normalization", "layernorm")).lower()
    args["normalization"] = "RMSNorm" if kind == "rmsnorm" else "LayerNorm"
    args["apply_layernorm_1p"] = kind == "layernorm1p" or bool(config.get("layernorm_zero_centered_gamma"))
    activation = str(config.get("activation", "gelu")).removeprefix("fast-")
    args["swiglu"], args["geglu"] = activation == "swiglu", activation == "geglu"
    args["squared_relu"] = activation == "squared-relu"
    args["openai_gelu"] = bool(config.get("openai_gelu"))
    args["untie_embeddings_and_output_weights"] = not config.get("share_embeddings_and_output_weights", True)
    if "num_experts" in args and "moe_ffn_hidden_size" not in args and "ffn_hidden_size" in args:
        args["moe_ffn_hidden_size"] = args["ffn_hidden_size"]
    if factor := config.get("seq_len_interpolation_factor"):
        args[SCALING] = {"rope_type": "linear", "factor": float(factor)}
    if (config.get("sliding_window_size") or 0) > 0:
        args["window_size"] = [config["sliding_window_size"] - 1, 0]
    for name in ("nxdt_family", "nxdt_extra"):
        if name in config:
            args[name] = config[name]
    return args


def _joined(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A T5's section, whose sizes are those of its encoder; the decoder's are the same but for layers."""
    encoder = config.get("encoder")
    if not isinstance(encoder, Mapping):
        return config
    tied = config.get("share_decoder_tokens_head_embeddings", True)
    half = {key: value for key, value in encoder.items() if (key, value) != ("num_moe_experts", 1)}  # NeMo's for none
    return {**config, **half, "share_embeddings_and_output_weights": tied}


# Of a T5's section: what both its halves have.
_HALF = (
    "hidden_size ffn_hidden_size num_attention_heads kv_channels normalization layernorm_epsilon activation "
    "openai_gelu bias position_embedding_type relative_attention_num_buckets relative_attention_max_distance"
).split()


def t5_config(model: Model, layout: Layout, kept: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """The `model:` section of a T5 of megatron-core."""
    whole = config_of(model, layout, {}, dtype)
    half = {key: whole[key] for key in _HALF if key in whole}
    halves = {"encoder": model.layers, "decoder": model.decoder_layers}
    base = {key: value for key, value in TEMPLATE.items() if key in ("micro_batch_size", "global_batch_size", "optim")}
    sections = {
        name: {**_T5_HALF, **(kept.get(name) or {}), **half, "num_layers": layers, "arch": "transformer"}
        for name, layers in halves.items()
    }
    return {
        **(kept or {**base, "tokenizer": dict(TEMPLATE["tokenizer"]), "seed": 1234, "use_cpu_initialization": True}),
        **{key: value for key, value in whole.items() if key not in (*_HALF, "num_layers", "mcore_gpt")},
        **sections,
        "mcore_t5": True,
        "seq_length": model.positions,
        "pipeline_model_parallel_split_rank": 0,
        "share_token_embeddings": True,
        "share_decoder_tokens_head_embeddings": model.tied,
        "tokens_head_bias": model.tied,
        "transformer_engine": True,
    }


_T5_HALF: dict[str, Any] = {
    "init_method_std": 0.02,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "transformer_block_type": "pre_ln",
    "normalize_attention_scores": True,
    "megatron_legacy": False,
    "headscale": False,
    "num_moe_experts": 1,
}


def config_of(model: Model, layout: Layout, kept: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """A `model:` section: what the source had, with what the model and the layout now are."""
    norm = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm1p" if model.norm_from_one else "layernorm"}[model.norm]
    activations = {
        "swiglu": "fast-swiglu",
        "geglu": "fast-geglu",
        "openai_gelu": "gelu",
        "squared_relu": "squared-relu",
        "relu": "relu",
    }
    scaling = model.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    said: dict[str, Any] = {
        "mcore_gpt": True,
        "encoder_seq_length": kept.get("encoder_seq_length") or model.positions,
        "max_position_embeddings": model.positions,
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.expert_ffn or model.ffn,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups if model.groups != model.heads else None,
        "kv_channels": model.head_size,
        "normalization": norm,
        "layernorm_zero_centered_gamma": model.norm_from_one,
        "layernorm_epsilon": model.norm_eps,
        "activation": activations.get(model.activation, model.activation),
        "openai_gelu": model.activation == "openai_gelu",
        "bias": model.bias,
        "qkv_bias": model.qkv_bias and not model.bias,
        "share_embeddings_and_output_weights": model.tied,
        "position_embedding_type": positions_of(model),
        "rotary_base": int(model.rope_base),
        "rotary_percentage": model.rope_fraction,
        "scale_positional_embedding": kind == "llama3",
        "seq_len_interpolation_factor": scaling.get("factor") if kind == "linear" else None,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "megatron_amp_O2": dtype != FLOAT32 and bool(kept.get("megatron_amp_O2", True)),
        "precision": {BFLOAT16: "bf16", FLOAT16: 16}.get(dtype, 32),
    }
    if model.experts:
        said |= {"num_moe_experts": model.experts, "moe_router_topk": model.experts_per_token}
    if kind == "llama3":
        said["scale_factor"] = float(scaling.get("factor", 8.0))
    if model.qk_norm:
        said["qk_layernorm"] = True
    said |= relative_of(model)
    if model.window:
        said["window_size"] = window_of(model)
    if layout.stages:
        said["num_layers_in_first_pipeline_stage"] = layout.stages[0]
        said["num_layers_in_last_pipeline_stage"] = layout.stages[-1]
    data = kept.get("data")
    if isinstance(data, Mapping) and str(data.get("seq_length", "")).startswith("${"):
        said["data"] = {**data, "seq_length": said["encoder_seq_length"]}
    return {**kept, **said}


def structured(config: Mapping[str, Any]) -> Any:
    """A `model:` section as the OmegaConf object that NeMo's checkpoints hold."""
    from omegaconf import OmegaConf

    return OmegaConf.create(dict(config))


# NeMo 2.0: fields of GPTConfig, those of megatron.core's TransformerConfig among them.
_TWO = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "normalization": "normalization",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type",
    "relative_attention_max_distance": "relative_attention_max_distance",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "scale_factor": "rope_scaling_factor",
    "window_size": "window_size",
    "num_moe_experts": "num_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
}


def two_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for the `config` of a NeMo 2.0 model, as context/model.yaml has it."""
    config = {key: value for key, value in config.items() if value is not None}
    args = {theirs: config[ours] for ours, theirs in _TWO.items() if ours in config}
    groups, heads = config.get("num_query_groups"), config.get("num_attention_heads")
    args["group_query_attention"] = bool(groups) and groups != heads
    args["num_query_groups"] = groups or 1
    function = config.get("activation_func")
    function = function.get("_target_", "") if isinstance(function, Mapping) else str(function or "")
    gated = bool(config.get("gated_linear_unit"))
    args["swiglu"], args["geglu"] = gated and "gelu" not in function, gated and "gelu" in function
    args["openai_gelu"] = "openai_gelu" in function and not gated
    args["squared_relu"] = "squared_relu" in function
    args["untie_embeddings_and_output_weights"] = not config.get("share_embeddings_and_output_weights", True)
    target = str(config.get("_target_", ""))
    args["use_rope_scaling"] = "scale_factor" in config and "Llama3" in target
    if "num_experts" in args and "moe_ffn_hidden_size" not in args and "ffn_hidden_size" in args:
        args["moe_ffn_hidden_size"] = args["ffn_hidden_size"]
    return args


def two_config(model: Model, layout: Layout, kept: Mapping[str, Any], dtype: DType, divisor: int) -> dict[str, Any]:
    """The `config` of context/model.yaml: GPTConfig's fields, over those that the source had."""
    llama3 = (model.rope_scaling or {}).get("rope_type", (model.rope_scaling or {}).get("type")) == "llama3"
    gated = model.gated
    functions = {
        "swiglu": "torch.nn.functional.silu",
        "squared_relu": "megatron.core.activations.squared_relu",
        "relu": "torch.nn.functional.relu",
    }
    said: dict[str, Any] = {
        "_target_": kept.get("_target_") or _class_of(model, "Llama31Config" if llama3 else "Config"),
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.expert_ffn or model.ffn,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups,
        "kv_channels": model.head_size,
        "seq_length": model.positions,
        "normalization": model.norm,
        "layernorm_epsilon": model.norm_eps,
        "layernorm_zero_centered_gamma": model.norm_from_one,
        "gated_linear_unit": gated,
        "activation_func": {
            "_target_": functions.get(model.activation, "torch.nn.functional.gelu"),
            "_call_": False,
        },
        "add_bias_linear": model.bias,
        "add_qkv_bias": model.qkv_bias and not model.bias,
        "qk_layernorm": model.qk_norm,
        "share_embeddings_and_output_weights": model.tied,
        "position_embedding_type": positions_of(model),
        "rotary_base": int(model.rope_base),
        "rotary_percent": model.rope_fraction,
        "window_size": window_of(model),
        "num_moe_experts": model.experts or None,
        "moe_router_topk": model.experts_per_token,
        "make_vocab_size_divisible_by": gcd(model.vocab, 128) if model.family in _UNPADDED else divisor,
        "bf16": dtype == BFLOAT16,
        "fp16": dtype == FLOAT16,
        "params_dtype": {"_target_": f"torch.{dtype.name}", "_call_": False},
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
    }
    said |= {name: said["params_dtype"] for name in ("pipeline_dtype", "autocast_dtype") if kept.get(name)}
    if model.family in ("mixtral", "qwen3"):
        said["max_position_embeddings"] = model.positions
    if "initializer_range" in model.extra:
        said["init_method_std"] = model.extra["initializer_range"]
    if llama3:
        said["scale_factor"] = float((model.rope_scaling or {}).get("factor", 8.0))
    if model.decoder_layers:
        said |= {
            "num_layers": model.decoder_layers,
            "encoder_num_layers": model.layers,
            "max_position_embeddings": model.positions,
        }
        del said["rotary_base"]
    said |= relative_of(model)
    return {**kept, **said}


def two_model(model: Model, config: Mapping[str, Any], kept: str, tokenizer: Mapping[str, Any] | None) -> Any:
    """context/model.yaml: NeMo's model with this configuration. kept: the class that the source named, or "" """
    return {"_target_": kept or _class_of(model, "Model"), "config": dict(config), "tokenizer": tokenizer}


def two_context(model: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of context/io.json: that model, and a trainer as NeMo's own importers leave it.

    Of the configuration's values those that are numbers, text or names; the class has the others.
    """
    config = {key: value for key, value in model["config"].items() if key == "_target_" or _is_plain(key, value)}
    own = {key: value for key, value in model.items() if value is not None}
    strategy = {"_target_": f"{_STRATEGIES}.megatron_strategy.MegatronStrategy", "ckpt_save_optimizer": False}
    trainer = {"_target_": "nemo.lightning.pytorch.trainer.Trainer", "accelerator": "cpu", "devices": 1}
    return {
        "_target_": "nemo.lightning.io.pl.TrainerContext",
        "model": {**own, "config": config},
        "trainer": {**trainer, "strategy": strategy},
        "extra": {},
    }


_STRATEGIES = "nemo.lightning.pytorch.strategies"
_AUTO = "nemo.lightning.io.artifact.hf_auto.from_pretrained"


def generation(folder: str) -> dict[str, Any]:
    """The `generation_config` of a generation_config.json in that folder of context/."""
    kind = {"_target_": "transformers.generation.configuration_utils.GenerationConfig", "_call_": False}
    return {"_target_": _AUTO, "auto_cls": kind, "pretrained_model_name_or_path": f"./{folder}"}


def _is_plain(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("_call_") is False or value.get("_target_") == _AUTO
    values = value if isinstance(value, (list, tuple)) else [value]
    return not key.startswith("_") and all(isinstance(one, (str, int, float, bool, type(None))) for one in values)


# Families whose vocabulary NeMo's importers leave without padding: Gemma's exporter does not cut it.
_UNPADDED = frozenset({"llama", "mistral", "gemma"})
# Families whose configuration says the vocabulary, as NeMo's importers have it; for others it is the tokenizer's.
VOCABULARY = frozenset({"llama", "qwen2", "qwen3"})
# Family: its module of nemo.collections.llm, and what the names of its classes begin with.
_CLASSES = {
    "llama": ("gpt.model.llama", "Llama"),
    "mistral": ("gpt.model.mistral", "Mistral"),
    "mixtral": ("gpt.model.mixtral", "Mixtral"),
    "qwen2": ("gpt.model.qwen2", "Qwen2"),
    "qwen3": ("gpt.model.qwen3", "Qwen3"),
    "gemma": ("gpt.model.gemma", "Gemma"),
    "t5": ("t5.model.t5", "T5"),
}


def _class_of(model: Model, kind: str) -> str:
    """NeMo 2.0's class of a family: its "Model", its "Config", or another of its module."""
    module, begin = _CLASSES.get(model.family, ("gpt.model.base", "GPT"))
    if model.family == "mistral" and kind == "Config":
        kind = "Config7B"
    return f"nemo.collections.llm.{module}.{begin if not kind.startswith(begin) else ''}{kind}"


# A `model:` section's other keys, for sources that have none. Paths and batch sizes are the user's to set.
TEMPLATE: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "sequence_parallel": False,
    "init_method_std": 0.02,
    "use_scaled_init_method": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
    "apply_query_key_layer_scaling": False,
    "attention_type": "multihead",
    "transformer_block_type": "pre_ln",
    "normalize_attention_scores": True,
    "pre_process": True,
    "post_process": True,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_add_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "get_attention_mask_from_fusion": True,
    "transformer_engine": False,
    "use_cpu_initialization": True,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "seed": 1234,
    "tokenizer": {
        "library": "huggingface",
        "type": None,
        "model": None,
        "vocab_file": None,
        "merge_file": None,
        "delimiter": None,
        "sentencepiece_legacy": False,
        "use_fast": True,
    },
    "data": {
        "data_prefix": [],
        "index_mapping_dir": None,
        "data_impl": "mmap",
        "splits_string": "900,50,50",
        "seq_length": "${.encoder_seq_length}",
        "skip_warmup": True,
        "num_workers": 2,
        "dataloader_type": "single",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "validation_drop_last": True,
    },
    "optim": {"name": "fused_adam", "lr": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.95]},
}
