"""What a migration works out of more than one key: precision, optimizer, experts, data, checkpoints, architecture.

Room config/ (leaf). Each function is named by rules of configs/migrate/ (`by`) and is called once a file, in the order
of DERIVED; it looks at what the file said and writes what NeMo 2.4 should read, with the reason for the report.
May import the standard library and the leaf's other modules. Proof: tests/config/migrate/test_derive.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_nemo.config.checks import SHARDED
from nxdt_nemo.config.migrate.report import Level
from nxdt_nemo.config.pipeline_layout import text_of
from nxdt_nemo.errors import ConfigError, UserError

if TYPE_CHECKING:
    from nxdt_nemo.config.migrate.engine import Migration

__all__ = ["DERIVED", "PRECISIONS", "TRAINING_PRECISIONS"]

SAVES = "exp_manager.checkpoint_callback_params"
ADAMS = ("adamw", "adamw_fp32OptState", "adam", "fused_adam")

# (trainer.precision, model.megatron_amp_O2, neuron.stochastic_rounding, what to know of it)
Precision = tuple[Any, bool, bool | None, str]
FP32: Precision = (32, False, None, "float32 throughout")
MIXED: Precision = ("bf16", True, None, "bf16 weights, float32 main parameters and gradient sums")
ROUNDED: Precision = ("bf16", True, True, "as mixed_precision, with stochastic rounding")
PURE: Precision = (
    *("bf16", True, True),
    "bf16 weights without a float32 copy do not exist here: main parameters are float32, 4 bytes more each",
)
# precision.type of NxD Training, by training_orchestrator.py; mixed_precisionSR is how its model spells it.
PRECISIONS: dict[str, Precision] = {
    "fp32": FP32,
    "mixed_precision": MIXED,
    "mixed_precision_SR": ROUNDED,
    "mixed_precisionSR": ROUNDED,
    "autocast": MIXED,
    "bf16SR": PURE,
}
# training_precision of NNM's train_setup.sh, with (ZeRO-1, optimizer) where the script sets them.
TRAINING_PRECISIONS: dict[str, tuple[Precision, bool, str]] = {
    "bf16SR": (PURE, False, "adamw"),
    "fp32_ZeroOptMaster": (ROUNDED, True, "adamw"),
    "fp32_ZeroOptMasterGradAcc": (MIXED, True, "adamw"),
    "megatron_amp_O2": (ROUNDED, False, "adamw"),
    "fp32_OptStates": (ROUNDED, False, "adamw_fp32OptState"),
    "fp32": (FP32, False, "adamw"),
}


def architecture(m: Migration) -> None:
    """NxD Training's Hugging Face models: what its config.json says, in NeMo's keys, under what the YAML says."""
    if m.was("model_source") != "hf":
        m.drop("model.model_config", "of Hugging Face models only, and this file's is Megatron's")
        return
    path = m.options.model_config or Path(str(m.was("model.model_config", "")))
    found = _hugging_face(path) if path.is_file() else None
    if m.options.model_config is not None and found is None:
        raise UserError("there is no such file", place=f"--model-config {path}")
    said: dict[str, Any] = {
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "layernorm_epsilon": 1e-5,
        "init_method_std": 0.02,
    } | (found or {})
    why = f"{path.name} of Hugging Face" if found else "a Llama's; the file's config.json is not on this machine"
    if _tokenized(m):
        said.pop("tokenizer.vocab_size", None)
    for key, value in said.items():
        if m.absent(f"model.{key}"):
            m.put(f"model.{key}", value, why)
    if found is None:
        for key in ("ffn_hidden_size", "num_attention_heads", "num_query_groups"):
            m.ask(f"model.{key}", f"it is in {path}, which is not on this machine: --model-config, or write it here")
    if not _aligns(m):
        m.put("model.make_vocab_size_divisible_by", 1, "as many rows as the Hugging Face model, if TP divides them")
    m.drop("model.model_config", "its values are NeMo's keys now" if found else "not on this machine")


FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
# Of rope_type llama3, which NeMo takes for granted beside the factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _hugging_face(path: Path) -> dict[str, Any]:
    """A config.json of AutoModelForCausalLM as keys of NeMo's `model`. Raises ConfigError for one of no such family."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"is no JSON: {error}", place=str(path)) from None
    kind = said.get("model_type", "llama") if isinstance(said, dict) else ""
    if kind not in FAMILIES:
        raise ConfigError(f"model_type={kind} is no Llama, Mistral, Mixtral, Qwen2 or Qwen3", place=str(path))
    heads = said.get("num_attention_heads")
    for name in ("attention_bias", "mlp_bias"):
        if said.get(name):
            raise ConfigError(f"{name} is true, which no released model of these families has", place=str(path))
    pairs = {
        "num_layers": said.get("num_hidden_layers"),
        "hidden_size": said.get("hidden_size"),
        "ffn_hidden_size": said.get("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": said.get("num_key_value_heads", heads),
        "kv_channels": _head_size(said, kind),
        "max_position_embeddings": said.get("max_position_embeddings"),
        "layernorm_epsilon": said.get("rms_norm_eps"),
        "init_method_std": said.get("initializer_range"),
        "rotary_base": said.get("rope_theta"),
        "share_embeddings_and_output_weights": said.get("tie_word_embeddings"),
        "num_moe_experts": said.get("num_local_experts"),
        "moe_router_topk": said.get("num_experts_per_tok"),
        "qkv_bias": True if kind == "qwen2" else None,
        "qk_layernorm": True if kind == "qwen3" else None,
        "tokenizer.vocab_size": said.get("vocab_size"),
    }
    if window := _window(said, kind, path):
        pairs["window_size"] = [window - 1, 0]
    pairs |= _rope_scaling(said.get("rope_scaling") or {}, path)
    return {key: value for key, value in pairs.items() if value is not None}


def _window(said: dict[str, Any], kind: str, path: Path) -> int | None:
    """Tokens that each one sees, with itself; None for all before it."""
    qwen = kind.startswith("qwen")
    windowed = said.get("use_sliding_window") if qwen else kind != "llama"
    if windowed and said.get("sliding_window") and qwen and (first := said.get("max_window_layers", 28)):
        reason = f"use_sliding_window from layer {first} on (max_window_layers): NeMo has one window for all layers"
        raise ConfigError(reason, place=str(path))
    return said.get("sliding_window") if windowed else None


def _head_size(said: dict[str, Any], kind: str) -> int | None:
    """Where it is not hidden_size / num_attention_heads."""
    size = said.get("head_dim") or (128 if kind == "qwen3" else None)
    heads, hidden = said.get("num_attention_heads"), said.get("hidden_size")
    return size if size and heads and size * heads != hidden else None


def _rope_scaling(said: dict[str, Any], path: Path) -> dict[str, Any]:
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return {}
    if kind == "linear":
        return {"seq_len_interpolation_factor": said.get("factor")}
    if kind != "llama3":
        raise ConfigError(f"rope_scaling of type {kind}: NeMo has llama3's and linear only", place=str(path))
    if other := [f"{key}={said[key]}" for key, value in LLAMA3.items() if said.get(key, value) != value]:
        raise ConfigError(f"rope_scaling of type llama3 with {', '.join(other)}: NeMo has Llama 3.1's", place=str(path))
    return {"scale_positional_embedding": True, "scale_factor": said.get("factor", 8.0)}


def megatron_core(m: Migration) -> None:
    """NeMo falls back to its legacy modules where the key of megatron-core is absent or False."""
    key, name = _core_key(m)
    if not key or (m.options.partial and not m.has(key)):
        return
    if name == "BART":
        if m.has("name"):
            m.keep("name", "NeMo has no megatron-core BART, and its legacy modules do not run on this backend", "error")
    elif m.absent(key) or m.now(key) is False:
        why = f"NeMo's legacy {name} does not run on this backend; a legacy checkpoint has to be converted"
        m.put(key, True, why, level="" if m.dialect == "nxdt" else "warning")


def _core_key(m: Migration) -> tuple[str, str]:
    sections = [*m.included, *(p for p in ("model.encoder", "model.decoder") if m.document.find(p) is not None)]
    if "bart" in str(m.was("name", "")):
        return "model.mcore_t5", "BART"
    if m.has("model.retro") or m.has("model.retrieval"):
        return "", ""
    if {"model.encoder", "model.decoder"} <= set(sections) or m.has("model.mcore_t5"):
        return "model.mcore_t5", "encoder-decoder"
    if m.has("model.mcore_bert") or m.has("model.bert_binary_head"):
        return "model.mcore_bert", "BERT"
    decoder = ("model.num_layers", "model.encoder_seq_length")
    if m.has("model.mcore_gpt") or not any(m.absent(key) for key in decoder):
        return "model.mcore_gpt", "GPT"
    return "", ""


def one_kv_head(m: Migration) -> None:
    """Multi-query attention: the legacy models' key, and NNM's BigCode, whose module has it without one."""
    if m.was("model.attention_type") == "multiquery":
        m.put("model.attention_type", "multihead", "megatron-core says it by the number of KV heads")
        m.put("model.num_query_groups", 1, "one KV head for all: model.attention_type was multiquery")
    elif m.dialect == "nnm" and "bigcode" in str(m.was("name", "")) and m.absent("model.num_query_groups"):
        m.put("model.num_query_groups", 1, "one KV head for all: NNM's BigCode module has no other")


def copies_of_kv_heads(m: Migration) -> None:
    """Copies follow from the sizes."""
    said, tp = (
        m.was("distributed_strategy.kv_replicator"),
        m.before.size("distributed_strategy.tensor_model_parallel_size"),
    )
    groups = m.before.number("model.num_kv_heads") or m.now("model.num_query_groups")
    why = "copies of KV heads follow from TP and the number of KV heads"
    if isinstance(groups, int) and isinstance(said, int) and said != max(1, tp // groups):
        text = f"{tp} tensor-parallel ranks need {max(1, tp // groups)} copies of {groups} KV heads: that many are made"
        m.drop("distributed_strategy.kv_replicator", text, "warning")
    else:
        m.drop("distributed_strategy.kv_replicator", why)


def window(m: Migration) -> None:
    """NxD's mask hides a key that is W or more tokens before the query; megatron-core counts the W - 1 before it."""
    key, size = "model.sliding_window_size", m.was("model.sliding_window_size")
    if not m.has(key):
        return
    seen = [size - 1, 0] if isinstance(size, int) else None
    m.put("model.window_size", seen, "the tokens before the query that it sees, without itself", key=key)


MODULES = {
    "CoreAttention": "core_attn",
    "LlamaMLP": "mlp",
    "ActivationMultiplyMLP": "mlp",
    "ParallelMLP": "mlp",
    "MixtralMLP": "mlp",
    "LlamaRMSNorm": "layernorm",
    "MixtralRMSNorm": "layernorm",
}


def recomputation(m: Migration) -> None:
    """Class names, and what a granularity goes with."""
    granularity, names = "model.activations_checkpoint_granularity", "model.activations_checkpoint_recompute"
    count, method = "model.activations_checkpoint_num_layers", "model.activations_checkpoint_method"
    kind = m.was(granularity)
    asked = m.was(names, [])
    if m.has(names):
        parts = list(dict.fromkeys(MODULES[name] for name in asked if name in MODULES))
        strange = [name for name in asked if name not in MODULES]
        level: Level = "warning" if strange else ""
        if kind == "selective" and parts:
            more = f"; {', '.join(strange)} is no part that megatron-core knows" if strange else ""
            m.put(
                "model.recompute_modules",
                parts,
                f"megatron-core's names of parts of a layer{more}",
                key=names,
                level=level,
            )
        else:
            m.drop(names, f"with granularity {kind or 'null'} no part is named", level)
    if kind == "selective" and m.now(count) is not None:
        m.put(count, None, "selective checkpointing is of a part of every layer: megatron-core takes no number with it")
    if kind == "full" and m.dialect == "nxdt":
        for key, value in ((method, "uniform"), (count, 1)):
            if m.absent(key) or m.now(key) is None:
                m.put(key, value, "NxD Training checkpoints each layer by itself, which NeMo says so")


def precision(m: Migration) -> None:
    """NxD Training's precision.type and NNM's training_precision, in NeMo's keys and this backend's."""
    if m.dialect == "nxdt":
        _nxdt_precision(m)
    elif m.dialect == "nnm":
        _nnm_precision(m)


def _nxdt_precision(m: Migration) -> None:
    kind = m.was("precision.type")
    if kind is None and (m.options.partial or not m.absent("trainer.precision")):
        return
    manual = [f"precision.{name}" for name in ("master_weights", "fp32_grad_acc", "xla_use_bf16", "xla_downcast_bf16")]
    rounding = "precision.neuron_rt_stochastic_rounding_en"
    if kind == "manual":
        half = any(str(m.was(key, 0)) == "1" for key in manual[2:])
        masters = bool(m.was(manual[0], False))
        chosen: Precision = FP32 if not half else (MIXED if masters else PURE)
        chosen = (*chosen[:2], True if half and str(m.was(rounding, 0)) == "1" else None, chosen[3])
    elif kind in PRECISIONS:
        chosen = PRECISIONS[kind]
    else:
        known = ", ".join([*PRECISIONS, "manual"])
        m.note(
            "kept", "precision.type", "precision.type", why=f"is no precision of NxD Training: {known}", level="error"
        )
        return
    why = (
        "part of precision.type=manual"
        if kind == "manual"
        else f"read with precision.type=manual only, and it is {kind}"
    )
    for key in (*manual, rounding):
        m.drop(key, why)
    m.drop("model.megatron_amp_O2", "ignored by NxD Training")
    m.drop("precision.type", "")
    m.document.set("trainer.precision", chosen[0])
    pure: Level = "warning" if chosen is PURE or chosen[3] == PURE[3] else ""
    m.forget("precision.type")
    m.note("mapped", "precision.type", "trainer.precision", new=chosen[0], why=chosen[3], level=pure)
    _set_precision(m, chosen, f"precision.type={kind}")


def _nnm_precision(m: Migration) -> None:
    said, written = m.options.training_precision, m.was("trainer.precision")
    if said:
        if said not in TRAINING_PRECISIONS:
            fix = f"it is one of {', '.join(TRAINING_PRECISIONS)}"
            raise UserError(f"training_precision={said} is not known", place="--train-setup", fix=fix)
        chosen, _, name = TRAINING_PRECISIONS[said]
        level: Level = "warning" if chosen is PURE else ""
        m.put("trainer.precision", chosen[0], f"training_precision={said}: {chosen[3]}", level=level)
        _set_precision(m, chosen, f"training_precision={said}")
        if m.now("model.optim.name") in ADAMS:
            m.put("model.optim.name", name, f"OPTIM_NAME of training_precision={said}")
    elif m.was("model.zero_use_master_weight") is True or m.was("model.megatron_amp_O2") is True:
        if written == 32:
            m.put("trainer.precision", "bf16", "float32 main parameters are of a bf16 model")
        _set_precision(m, MIXED, "the file asks for float32 main parameters")
    elif written in (32, "32") and m.has("model"):
        text = (
            "NNM computes in train_setup.sh's training_precision (bf16SR as shipped): give --train-setup, else float32"
        )
        m.keep("trainer.precision", text, "question")


def _set_precision(m: Migration, chosen: Precision, said: str) -> None:
    """megatron_amp_O2 and rounding, as the precision has them."""
    if m.absent("model.megatron_amp_O2") or m.now("model.megatron_amp_O2") != chosen[1]:
        m.put("model.megatron_amp_O2", chosen[1], f"{said}: main parameters in float32" if chosen[1] else said)
    if chosen[2] and m.now("neuron.stochastic_rounding") is not True:
        m.put("neuron.stochastic_rounding", True, f"{said}: NEURON_RT_STOCHASTIC_ROUNDING_EN")


def optimizer(m: Migration) -> None:
    """ZeRO-1 is a property of the optimizer in NeMo."""
    keys = ("distributed_strategy.zero1",) if m.dialect == "nxdt" else _zero_keys(m)
    if m.dialect == "nemo" or (m.options.partial and not any(m.has(key) for key in keys)):
        return
    zero: Any = m.was(keys[0], True) if m.dialect == "nxdt" else m.was("model.wrap_with_zero", False)
    if m.options.training_precision in TRAINING_PRECISIONS:
        zero = TRAINING_PRECISIONS[m.options.training_precision][1]
    name = m.now("model.optim.name")
    if not isinstance(zero, bool):
        m.drop(
            keys[0],
            f"is {zero}, which is not known here: True means model.optim.name=mcore_distributed_optim",
            "question",
        )
        return
    for key in keys:
        m.drop(key, "model.optim.name says it" if zero else "off")
    if zero and name in ADAMS:
        m.put("model.optim.name", SHARDED[0], f"AdamW with ZeRO-1 (was {name})")
        m.drop("model.optim.capturable", "of torch's AdamW: the sharded optimizer has no such switch")
    elif zero and name is not None and name not in SHARDED:
        m.note(
            "kept",
            "model.optim.name",
            "model.optim.name",
            new=name,
            why="with ZeRO-1 there is AdamW only",
            level="error",
        )


def _zero_keys(m: Migration) -> tuple[str, ...]:
    names = ("wrap_with_zero", "zero_use_master_weight", "zero_use_fp32_grad_accum")
    return tuple(f"model.{name}" for name in names)


def capacity(m: Migration) -> None:
    """NxD's capacity is ceil(factor x tokens x top_k / experts), as megatron-core's; it drops by position."""
    dropless, factor = m.was("model.moe.dropless", False), m.was("model.moe.capacity_factor")
    key = "model.moe.capacity_factor"
    if m.has(key):
        full = dropless or not factor
        why = "an expert takes all its tokens" if full else "room of an expert, in its even share of tokens"
        m.put("model.moe_expert_capacity_factor", None if full else factor, why, key=key)
        if not full:
            m.put("model.moe_token_drop_policy", "position", "NxD drops the tokens that come last")
    m.drop("model.moe.dropless", "model.moe_expert_capacity_factor says it")


def routing(m: Migration) -> None:
    """Which balancing, and whether the weights of the chosen experts add up to one."""
    algorithm = m.was("model.moe.routing_algorithm")
    if m.has("model.moe.routing_algorithm"):
        loss = m.was("model.moe.router_aux_loss_coef", 0)
        kind = "sinkhorn" if algorithm == "sinkhorn" else ("aux_loss" if loss else "none")
        key = "model.moe.routing_algorithm"
        m.put("model.moe_router_load_balancing_type", kind, f"{algorithm} with an auxiliary loss of {loss}", key=key)
    key, normal = "model.moe.normalize_top_k_affinities", m.was("model.moe.normalize_top_k_affinities", True)
    if m.has(key):
        why = "a softmax over the chosen experts adds up to one" if normal else "a softmax over all experts comes first"
        m.put("model.moe_router_pre_softmax", not normal, why, key=key)
    m.drop("model.moe.router_activation", "read with sinkhorn only, for which megatron-core has its own")


def data_files(m: Migration) -> None:
    """Folders of token ids have to become .bin and .idx; jsonl files of an alignment go to NeMo's data sets."""
    folder, held = m.was("data.train_dir"), m.was("data.val_dir")
    if m.options.partial and folder is None and held is None:
        return
    if _aligns(m):
        _alignment_files(m, folder, held)
        if not _prefers(m):
            _tuning_data(m)
        for section in ("train_ds", "validation_ds") if _prefers(m) else ():
            if not m.absent(f"model.data.{section}"):
                m.put(f"model.data.{section}.add_bos", True, "NxD Training begins each row with it")
    elif m.has("data.train_dir"):
        _token_rows(m)
    samples: Level = "warning" if m.was("data.dev_choose_samples") is not None else ""
    m.drop(
        "data.dev_choose_samples",
        "off" if not samples else "cut the jsonl file instead: nothing takes its head",
        samples,
    )


def _token_rows(m: Migration) -> None:
    """Folders of Dataset.save_to_disk, which this backend's reader of token ids takes as they are."""
    m.put("model.data.data_impl", "arrow", "rows of token ids, read as `datasets` saved them (docs/migrate.md)")
    m.drop("data.data_prefix", "Megatron's data, and data.train_dir names other")
    for key, split in (("data.train_dir", "train"), ("data.val_dir", "validation"), ("data.test_dir", "test")):
        folder = m.was(key)
        if folder is not None:
            m.put(f"model.data.data_prefix.{split}", [folder], "a folder for each split", key=key)
        elif m.has(key):
            m.drop(key, "no folder")
    if m.was("data.train_dir") is None:
        m.ask("model.data.data_prefix.train", "a folder of token ids")


def _alignment_files(m: Migration, folder: Any, held: Any) -> None:
    for key, value, section in (("data.train_dir", folder, "train_ds"), ("data.val_dir", held, "validation_ds")):
        if not m.has(key):
            continue
        if value is None:
            m.drop(key, "no file")
            if section == "validation_ds" and _prefers(m):
                continue
            m.ask(f"model.data.{section}.file_names", "NeMo's tuning wants jsonl files for both sets")
            continue
        m.put(f"model.data.{section}.file_names", [value], "NeMo takes a list of jsonl files", key=key)
        for name in ("global_batch_size", "micro_batch_size"):
            m.put(f"model.data.{section}.{name}", f"${{model.{name}}}", "NeMo reads it there")
        m.put(f"model.data.{section}.max_seq_length", "${model.encoder_seq_length}", "NeMo reads it there")


# What NeMo 2.4's megatron_gpt_sft_model.py reads without a default, as its megatron_gpt_finetuning_config.yaml has it;
# and, where its default is another, how NxD Training reads {"input": ..., "output": ...} into sequences of one length.
_RECORDS = {
    "num_workers": 0,
    "pin_memory": True,
    "drop_last": True,
    "min_seq_length": 1,
    "label_key": "output",
    "truncation_field": "input",
    "prompt_template": "{input}{output}",  # without a space: NxD Training puts their ids side by side
    "add_bos": True,
    "pad_to_max_length": True,
}
TUNING_DATA: dict[str, dict[str, Any]] = {
    "train_ds": {"shuffle": True, "concat_sampling_probabilities": [1.0], **_RECORDS},
    "validation_ds": {
        "shuffle": False,
        **_RECORDS,
        "metric.name": "loss",
        "metric.average": None,
        "metric.num_classes": None,
    },
}


def _tuning_data(m: Migration) -> None:
    for section, keys in TUNING_DATA.items():
        for name, value in keys.items():
            m.put(f"model.data.{section}.{name}", value, "NeMo's tuning reads it")


def _prefers(m: Migration) -> bool:
    return any(m.has(f"model_alignment_strategy.{method}") for method in ("dpo", "orpo"))


def _aligns(m: Migration) -> bool:
    return m.has("model_alignment_strategy") or bool(m.was("data.use_sft_style_data_module", False))


UNPACKED = "each sample is padded for itself; NeMo packs beforehand, by its prepare_packed_ft_dataset.py"


def alignment(m: Migration) -> None:
    """SFT, DPO and ORPO under neuron.alignment."""
    for node in list(m.document.nodes()):
        key = node.origin
        if not node.is_section and key.startswith("model_alignment_strategy.") and ".peft." not in key:
            path = f"neuron.alignment.{key.removeprefix('model_alignment_strategy.')}"
            if ".sft." in key:
                m.put(path, node.data, UNPACKED, key=key, level="warning" if node.data is True else "")
            else:
                m.put(path, node.data, "neuron.alignment: NeMo 2.4 has no keys for it", key=key)
    if m.has("data.packing"):
        packed = m.was("data.packing")
        m.put("neuron.alignment.sft.packing", packed, UNPACKED, key="data.packing", level="warning" if packed else "")
    m.drop("data.use_sft_style_data_module", "neuron.alignment.sft says it")


LORA_TARGETS = {
    "qkv_proj": "attention_qkv",
    "o_proj": "attention_dense",
    "gate_up_proj": "mlp_fc1",
    "down_proj": "mlp_fc2",
}
# Their key: NeMo's, and what NxD Training takes where there is none.
LORA = {
    "lora_rank": ("adapter_dim", 16),
    "lora_alpha": ("alpha", 32),
    "lora_dropout": ("adapter_dropout", 0.05),
}
LORA_DROPPED = {
    "lora_bias": "NeMo's LoRA trains no biases",
    "lora_verbose": "the log says what is trained",
    "save_lora_base": "the base model's checkpoint stays where it is",
    "merge_lora": "merging is a command of its own in NeMo",
    "save_lora_config_adapter": "an adapter's checkpoint holds its configuration",
    "merge_sharded_lora": "a distributed checkpoint is whole, whatever the layout",
}


def peft(m: Migration) -> None:
    """LoRA under NeMo's model.peft."""
    base = "model_alignment_strategy.peft"
    lora = m.has(base)
    if lora:
        m.put("model.peft.peft_scheme", "lora", f"{base} is LoRA")
    elif _aligns(m) and not _prefers(m):
        m.put("model.peft.peft_scheme", None, "all weights are tuned")
    if lora or (_aligns(m) and not _prefers(m)):
        m.put("model.peft.restore_from_path", None, "NeMo's tuning reads it")
    if not lora:
        return
    m.put("model.peft.lora_tuning.weight_tying", False, "NeMo's LoRA reads it without a default")
    m.put("model.peft.lora_tuning.dropout_position", "pre", "NxD drops of an adapter's input, NeMo of its output")
    for theirs, (ours, default) in LORA.items():
        key, path = f"{base}.{theirs}", f"model.peft.lora_tuning.{ours}"
        if m.has(key):
            m.put(path, m.was(key), "NeMo's name", key=key)
        else:
            m.put(path, default, f"NxD Training's own where {theirs} is not given")
    key = f"{base}.target_modules"
    if not m.has(key):
        m.put("model.peft.lora_tuning.target_modules", ["attention_qkv"], "qkv_proj is NxD Training's own")
    else:
        names = m.was(key, [])
        strange = [name for name in names if name not in LORA_TARGETS]
        found = [LORA_TARGETS[name] for name in names if name in LORA_TARGETS]
        why = f"{', '.join(strange)} has no counterpart in NeMo's LoRA" if strange else "NeMo's names of the layers"
        m.put("model.peft.lora_tuning.target_modules", found, why, key=key, level="error" if strange else "")
    for name, why in LORA_DROPPED.items():
        odd = name == "lora_bias" and m.was(f"{base}.{name}", "none") != "none"
        m.drop(f"{base}.{name}", why, "error" if odd else "")
    load = f"{base}.load_lora_from_ckpt"
    level: Level = "question" if m.was(load, False) else ""
    m.drop(load, "name the adapter in model.peft.restore_from_path" if level else "off", level)


def resuming(m: Migration) -> None:
    """Where weights, or a whole state, come from."""
    resume, weights = "exp_manager.resume_from_checkpoint", "model.weight_init_only"
    convert = "an NxD or legacy checkpoint has to be converted first"
    value = m.was(resume)
    if m.dialect == "nxdt":
        if m.was("exp_manager.resume_if_exists", False) and m.was(f"{SAVES}.save_last") is False:
            m.put(
                f"{SAVES}.save_last", True, "NeMo goes on from the checkpoint named -last, NxD Training from the newest"
            )
        if m.was(weights, False) and value is not None:
            m.put("model.restore_from_path", value, f"{weights}: weights only; {convert}", key=resume, level="warning")
        elif value is not None:
            m.keep(resume, convert, "warning")
        elif m.has(resume):
            m.keep(resume, "NeMo 2.4 reads it")
        m.drop(weights, "model.restore_from_path says it" if value is not None else "no checkpoint is named")
        if _aligns(m):
            m.ask("model.restore_from_path", "tuning begins from a model: a .nemo file, or its folder")
        return
    old = "trainer.resume_from_checkpoint"
    if m.has(old):
        if m.was(old) is None:
            m.drop(old, "gone from Lightning 2's Trainer, and null")
        else:
            m.put(resume, m.was(old), f"Lightning 2 has it no more; {convert}", key=old, level="warning")
    legacy = m.dialect == "nnm" or m.has("trainer.replace_sampler_ddp")
    if legacy and m.has("model.resume_from_checkpoint") and m.has("exp_manager") and m.absent(resume):
        m.put(resume, "${model.resume_from_checkpoint}", "NeMo 2.4 reads it there, and its files refer to it so")


def times_of_saving(m: Migration) -> None:
    """NeMo's default every_n_epochs=1 excludes every_n_train_steps; a time interval cannot be written in YAML."""
    steps, epochs, interval = f"{SAVES}.every_n_train_steps", f"{SAVES}.every_n_epochs", f"{SAVES}.train_time_interval"
    if m.was(interval) is not None:
        why = f"NeMo 2.4 wants a timedelta, which YAML cannot write: set {steps}"
        m.drop(interval, f"{why} (was {m.was(interval)} seconds)", "warning")
    else:
        m.drop(interval, "null")
    every = m.now(steps)
    if every is not None and every != 0 and m.absent(epochs):
        m.put(epochs, None, "NeMo's own 1 excludes every_n_train_steps")


def softmax(m: Migration) -> None:
    """A fused softmax: NeMo's key, and the compiler's operation."""
    key, fused = "model.fusions.softmax", m.was("model.fusions.softmax")
    if m.has(key):
        m.put("model.masked_softmax_fusion", fused, "NeMo's name", key=key)
        if fused is True:
            m.put("neuron.fuse_softmax", True, f"{key}=True: NEURON_FUSE_SOFTMAX")


def uneven_stages(m: Migration) -> None:
    """NxD shares out layers that the pipeline does not divide, the later stages taking one more; NeMo wants it said."""
    size, layers = (
        m.before.size("distributed_strategy.pipeline_model_parallel_size"),
        m.before.number("model.num_layers"),
    )
    said = m.was("model.pipeline_cuts") is not None or m.options.partial
    chunks = m.before.size("distributed_strategy.virtual_pipeline_model_parallel_size")
    if m.dialect != "nxdt" or said or layers is None or layers % size == 0 or chunks > 1:
        return
    least, more = divmod(layers, size)
    layout = text_of([least + (stage >= size - more) for stage in range(size)])
    m.put(
        "model.pipeline_model_parallel_layout",
        layout,
        f"{size} stages do not divide {layers} layers: NxD's own sharing out",
    )


def stages(m: Migration) -> None:
    """`0:4,1-2:8,-1:4`, layers by pipeline rank, as megatron-core's layout."""
    key, said = "model.flexible_pipeline_parallel_stages", m.was("model.flexible_pipeline_parallel_stages")
    if said is None:
        m.drop(key, "null")
        return
    size, counts = m.before.size("model.pipeline_model_parallel_size"), {}
    try:
        for part in str(said).split(","):
            ranks, _, count = part.partition(":")
            low, dash, high = (
                ranks.strip().partition("-") if not ranks.strip().startswith("-") else (ranks.strip(), "", "")
            )
            for rank in range(int(low), int(high if dash else low) + 1):
                counts[rank % size] = int(count)
    except ValueError:
        m.keep(key, f"{said} is not read: write it as 0:4,1-2:8,-1:4", "error")
        return
    layers, rest = m.before.number("model.num_layers") or 0, [rank for rank in range(size) if rank not in counts]
    left = layers - sum(counts.values())
    if rest and left % len(rest) == 0:
        counts |= dict.fromkeys(rest, left // len(rest))
    if len(counts) < size or sum(counts.values()) != layers:
        m.keep(key, f"{said} does not give {size} stages {layers} layers", "error")
        return
    layout = text_of([counts[rank] for rank in range(size)])
    m.put("model.pipeline_model_parallel_layout", layout, "megatron-core's way to say it", key=key)


def fill_in_the_middle(m: Migration) -> None:
    """NNM's rates, with StarCoder's tokens, which its data set names in the code."""
    rate = m.was("model.data.fim_rate", 0)
    for name in ("rate", "spm_rate"):
        key = f"model.data.fim_{name}"
        if m.has(key):
            m.put(f"model.data.fim.{name}", m.was(key), "NeMo's section model.data.fim", key=key)
    if rate:
        m.put("model.data.add_fim", True, "NeMo 2.4 has a switch for it")
        tokens = {name: f"<fim_{name}>" for name in ("prefix", "middle", "suffix", "pad")} | {"eod": "<|endoftext|>"}
        for name, token in tokens.items():
            path = f"model.data.fim.extra_tokens.{name}"
            if m.absent(path):
                m.put(path, token, "StarCoder's, which NNM has in its code")


def _tokenized(m: Migration) -> bool:
    return m.has("data.tokenizer") or m.has("model.tokenizer")


def tokenizer(m: Migration) -> None:
    """NxD Training's Hugging Face data needs none for pretraining, and no library for an alignment."""
    if m.dialect != "nxdt" or m.options.partial:
        return
    if not _tokenized(m):
        m.put("model.tokenizer.library", "null", "token ids need no tokenizer: the vocabulary's size is all of it")
        m.ask("model.tokenizer.vocab_size", "the vocab_size of the model's config.json")
        return
    if m.absent("model.tokenizer.library"):
        m.put("model.tokenizer.library", "huggingface", "NxD Training's AutoTokenizer")


# In this order: later ones look at what earlier ones wrote.
DERIVED: dict[str, Callable[[Migration], None]] = {
    "architecture": architecture,
    "megatron_core": megatron_core,
    "one_kv_head": one_kv_head,
    "copies_of_kv_heads": copies_of_kv_heads,
    "window": window,
    "stages": stages,
    "uneven_stages": uneven_stages,
    "softmax": softmax,
    "recomputation": recomputation,
    "precision": precision,
    "optimizer": optimizer,
    "capacity": capacity,
    "routing": routing,
    "alignment": alignment,
    "data_files": data_files,
    "peft": peft,
    "tokenizer": tokenizer,
    "resuming": resuming,
    "times_of_saving": times_of_saving,
    "fill_in_the_middle": fill_in_the_middle,
}
