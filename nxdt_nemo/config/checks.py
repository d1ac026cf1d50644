"""The rules of a configuration that need more than one key, each with the message it prints.

Room config/ (leaf). Stands in for the asserts that NeMo and megatron-core raise from many places, later and on every
rank. Each rule takes a View and yields what it finds; ERRORS and CHANGES give their order.
May import the standard library and nxdt_nemo.errors. Proof: tests/config/test_checks.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from math import gcd

from nxdt_nemo.config import batches, exp_manager, layers, pipeline_layout
from nxdt_nemo.config import experts as expert_rules
from nxdt_nemo.config.data_prefix import as_list, prefix_errors
from nxdt_nemo.config.report import GONE, Change, or_list
from nxdt_nemo.config.targets import targets
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ACCELERATORS", "CHANGES", "DOUBTS", "ERRORS", "SHARDED", "trains"]

Errors = Iterator[ConfigError]
Changes = Iterator[Change]

# What the user may write; all but cpu mean neuron while the backend is active.
ACCELERATORS = ("neuron", "gpu", "cuda", "auto", "tpu", "cpu")
FP16 = (16, "16", "16-mixed", "16-true", "fp16")
BF16 = ("bf16", "bf16-mixed")
FP32 = (32, "32", "32-true")

OPTIMIZERS = (
    *("fused_adam", "distributed_fused_adam", "mcore_distributed_optim", "adamw", "adamw_fp32OptState", "adam", "sgd"),
    *("adadelta", "adamax", "adagrad", "rmsprop", "rprop", "lamb", "adan", "megatron_fused_adam"),
)
SHARDED = ("mcore_distributed_optim", "distributed_fused_adam")
UNSAVED = {"novograd": "one number a parameter", "adafactor": "rows and columns of its moments"}
SCHEDULES = (
    *("CosineAnnealing", "LinearAnnealingWithWarmUp", "WarmupPolicy", "WarmupHoldPolicy", "WarmupAnnealing"),
    *("SquareAnnealing", "SquareRootAnnealing", "NoamAnnealing", "NoamHoldAnnealing", "InverseSquareRootAnnealing"),
    *("T5InverseSquareRootAnnealing", "PolynomialDecayAnnealing", "PolynomialHoldDecayAnnealing", "StepLR"),
    *("ExponentialLR", "ReduceLROnPlateau", "CyclicLR"),
)

TP = "model.tensor_model_parallel_size"
PP = "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
CP = "model.context_parallel_size"
EP = "model.expert_model_parallel_size"
BUCKET = "neuron.bucket_size_collectives"
MICRO, GLOBAL = "model.micro_batch_size", "model.global_batch_size"
SIZES = (TP, PP, CP, EP, MICRO, GLOBAL, "model.num_layers", "model.num_attention_heads")


def trains(view: View) -> bool:
    """True if the config trains: it has an optimizer and does not ask for validation only."""
    return view.get("model.optim.name") is not None and not view.get("model.skip_train", False)


def divisors(number: int) -> list[int]:
    """The divisors of a number, ascending."""
    return [part for part in range(1, max(1, number) + 1) if number % part == 0]


def positive_sizes(view: View) -> Errors:
    """Degrees of parallelism, batch sizes and layers are positive whole numbers."""
    for key in SIZES:
        value = view.get(key)
        if value is not None and (view.number(key) or 0) < 1:
            yield view.error(f"{key}={value} is not a positive whole number")


def accelerator(view: View) -> Errors:
    """A device that we stand in for, or cpu."""
    value = view.get("trainer.accelerator")
    if isinstance(value, str) and value not in ACCELERATORS:
        yield view.error(f"trainer.accelerator={value} is not known here", f"use {or_list(ACCELERATORS)}")


def tensor_parallel(view: View) -> Errors:
    """TP divides attention heads and the feed-forward size; it divides the query groups or is a multiple of them."""
    tp = view.size(TP)
    heads = view.number("model.num_attention_heads")
    groups = view.number("model.num_query_groups")
    ffn = view.number("model.ffn_hidden_size")
    if heads and heads % tp:
        yield view.error(f"{TP}={tp} does not divide model.num_attention_heads={heads}", _tp_sizes(heads, groups))
    elif groups and groups % tp and tp % groups:
        reason = f"{TP}={tp} neither divides model.num_query_groups={groups} nor is a multiple of it"
        yield view.error(reason, _tp_sizes(heads or groups, groups))
    elif groups and groups % tp and view.get("model.peft.peft_scheme") not in (None, "none"):
        scheme = f"model.peft.peft_scheme={view.get('model.peft.peft_scheme')}"
        reason = f"{scheme} with copies of KV heads ({TP}={tp}, model.num_query_groups={groups}) is not supported"
        yield view.error(reason, f"use {TP} {or_list(divisors(gcd(heads or groups, groups)))}")
    elif ffn and ffn % tp:
        yield view.error(f"{TP}={tp} does not divide model.ffn_hidden_size={ffn}", f"use a multiple of {tp}")


def _tp_sizes(heads: int, groups: int | None) -> str:
    fits = [size for size in divisors(heads) if not groups or groups % size == 0 or size % groups == 0]
    return f"use {or_list(fits)}"


def pipeline_parallel(view: View) -> Errors:
    """PP divides the layers, less those of a first and last stage of their own."""
    if pipeline_layout.given(view):
        return
    stages, layers = view.size(PP), view.number("model.num_layers")
    if layers is None:
        return
    even = True
    for place in ("first", "last"):
        own = view.number(f"model.num_layers_in_{place}_pipeline_stage")
        if own is not None:
            stages, layers, even = stages - 1, layers - own, False
    for place in ("embedding", "loss"):
        if view.get(f"model.account_for_{place}_in_pipeline_split", False):
            layers, even = layers + 1, False
    if stages < 1 or layers % stages == 0:
        return
    written = f"{PP}={view.size(PP)} does not divide model.num_layers={view.number('model.num_layers')}"
    if even:
        yield view.error(written, f"use {or_list(divisors(layers))}")
    else:
        yield view.error(f"{written} as its uneven stages ask", f"leave {stages} stages a multiple of {stages} layers")


def interleaved(view: View) -> Errors:
    """What megatron-core's interleaved schedule and NeMo ask of a virtual pipeline size."""
    chunks, stages = view.number(VPP), view.size(PP)
    if chunks is None or chunks <= 1:
        return
    if stages == 1:
        yield view.error(f"{VPP}={chunks} needs a pipeline, and {PP} is 1", f"use {VPP}=null")
        return
    if not _core_switch(view)[0].endswith("mcore_gpt"):
        yield view.error(f"{VPP}={chunks}: only GPT models are built in chunks", "use null")
    if view.training and not view.get("model.megatron_amp_O2", False):
        yield view.error(
            f"{VPP}={chunks} trains with model.megatron_amp_O2=True only, says NeMo", "set both or neither"
        )
    layers, uneven = view.number("model.num_layers"), _uneven(view)
    if layers and not uneven and layers % (stages * chunks):
        fits = or_list(part for part in divisors(layers // stages) if part > 1) if layers % stages == 0 else "null"
        reason = f"{VPP}={chunks} x {PP}={stages} does not divide model.num_layers={layers}"
        yield view.error(reason, f"use {VPP}={fits or 'null'}")
    batches = _micro_batches(view)
    if batches and batches % stages:
        yield view.error(
            f"{VPP}={chunks}: {PP}={stages} does not divide the {batches} micro-batches of a step",
            f"use a {GLOBAL} that gives a multiple of {stages}",
        )


def _uneven(view: View) -> bool:
    places = [view.get(f"model.num_layers_in_{place}_pipeline_stage") is not None for place in ("first", "last")]
    counted = [view.get(f"model.account_for_{place}_in_pipeline_split", False) for place in ("embedding", "loss")]
    return any(places + counted) or pipeline_layout.given(view)


def _micro_batches(view: View) -> int | None:
    """A step's on one data-parallel rank; None where the configuration does not say."""
    micro, whole, ranks = view.number(MICRO), view.number(GLOBAL), view.world_size
    model = view.size(TP) * view.size(PP) * view.size(CP)
    if not micro or not whole or ranks is None or ranks % model or whole % (micro * (ranks // model)):
        return None
    return whole // (micro * (ranks // model))


def experts(view: View) -> Errors:
    """Expert parallelism divides the experts, and the ranks that are not a model's own."""
    ep, number = view.size(EP), view.number("model.num_moe_experts")
    if number and view.training and view.size(TP) > 1 and not view.get("model.sequence_parallel", False):
        reason = f"model.num_moe_experts={number} with {TP}={view.size(TP)} trains with sequence parallelism only"
        yield view.error(reason, "use model.sequence_parallel=True")
    if ep == 1:
        return
    if number is None:
        yield view.error(f"{EP}={ep} without model.num_moe_experts", f"use {EP}=1, or say how many experts there are")
    elif number % ep:
        yield view.error(
            f"{EP}={ep} does not divide model.num_moe_experts={number}", f"use {or_list(divisors(number))}"
        )
    if view.training and not view.get("model.megatron_amp_O2", False):
        yield view.error(f"{EP}={ep} trains with model.megatron_amp_O2=True only, says NeMo", "set both or neither")
    ranks, model = view.world_size, view.size(TP) * view.size(PP)
    if ranks is not None and ranks % (model * ep):
        yield view.error(
            f"{ranks} ranks are not divisible by {TP}={view.size(TP)} x {PP}={view.size(PP)} x {EP}={ep}",
            f"use a multiple of {model * ep} ranks",
        )


def world(view: View) -> Errors:
    """TP x PP x CP divides the ranks, and the batch divides among the data-parallel ones."""
    degrees = {key: view.size(key) for key in (TP, PP, CP)}
    model = degrees[TP] * degrees[PP] * degrees[CP]
    ranks = view.world_size
    if ranks is not None and ranks % model:
        product = " x ".join(f"{key}={value}" for key, value in degrees.items() if value > 1)
        yield view.error(f"{ranks} ranks are not divisible by {product}", f"use a multiple of {model} ranks")
        return
    micro, whole = view.number(MICRO), view.number(GLOBAL)
    if not micro or not whole or micro < 1 or whole < 1:
        return
    data = 1 if ranks is None else ranks // model
    if rest := whole % (micro * data):
        among = f" x {data} data-parallel ranks" if data > 1 else ""
        fits = or_list(size for size in (whole - rest, whole - rest + micro * data) if size)
        yield view.error(f"{GLOBAL}={whole} is not divisible by {MICRO}={micro}{among}", f"use {fits}")


def sequence_parallel(view: View) -> Errors:
    """Sequence parallelism splits the sequence among the tensor-parallel ranks."""
    tp, length = view.size(TP), view.number("model.encoder_seq_length")
    if view.get("model.sequence_parallel", False) and length and length % tp:
        yield view.error(
            f"model.sequence_parallel=True needs {TP}={tp} to divide model.encoder_seq_length={length}",
            f"use a multiple of {tp}",
        )


def sequence_parallel_alone(view: View) -> Errors:
    """NeMo would turn it off, and builds megatron-core's configuration, which refuses it, before that."""
    if view.training and view.get("model.sequence_parallel", False) and view.size(TP) == 1:
        yield view.error(f"model.sequence_parallel=True needs {TP} above 1", "use model.sequence_parallel=False")


def context_parallel(view: View) -> Errors:
    """Each context-parallel rank takes two pieces of the sequence, one from each end."""
    cp, length = view.size(CP), view.number("model.encoder_seq_length")
    pieces = 2 * cp * (view.size(TP) if view.get("model.sequence_parallel", False) else 1)
    if cp > 1 and length and length % pieces:
        yield view.error(
            f"{CP}={cp} cuts the sequence into {pieces} pieces, which do not divide model.encoder_seq_length={length}",
            f"use a multiple of {pieces}",
        )


def not_here(view: View) -> Errors:
    """What this backend does not do."""
    if view.get("model.fsdp", False):
        yield view.error("model.fsdp=True is not supported", "use False: ranks beyond TP x PP are data parallel")


def names(view: View) -> Errors:
    """Optimizers and schedules by the names of NeMo and NxD Training; a script may register others."""
    name = view.get("model.optim.name") if view.training else None
    if name in UNSAVED:
        reason = f"model.optim.name={name} keeps {UNSAVED[name]}, which a distributed checkpoint does not take"
        yield view.error(reason, f"use {or_list(OPTIMIZERS)}")
    elif isinstance(name, str) and name not in OPTIMIZERS and (near := get_close_matches(name, OPTIMIZERS)):
        yield view.error(f"model.optim.name={name} is no optimizer", f"did you mean {near[0]}?")
    sched = view.get("model.optim.sched.name") if view.training else None
    if isinstance(sched, str) and sched not in SCHEDULES and (near := get_close_matches(sched, SCHEDULES)):
        yield view.error(f"model.optim.sched.name={sched} is no schedule", f"did you mean {near[0]}?")


def names_of_others(view: View) -> Errors:
    """Names that are not like any of NeMo's: of a script that registers them, or wrong."""
    for key, known in (("model.optim.name", OPTIMIZERS), ("model.optim.sched.name", SCHEDULES)):
        name = view.get(key) if view.training else None
        if isinstance(name, str) and name not in (*known, *UNSAVED) and not get_close_matches(name, known):
            yield view.error(f"{key}={name} is none of NeMo's", f"use {or_list(known)}, or a script that registers it")


def sharded_optimizers(view: View) -> Errors:
    """What NeMo reads without a default, or not at all, when the optimizer is sharded."""
    name = view.get("model.optim.name") if view.training else None
    if name == "mcore_distributed_optim":
        for key in ("model.optim.lr", "model.optim.weight_decay", "model.optim.betas"):
            if view.get(key) is None:
                yield view.error(f"model.optim.name={name} needs {key}", f"set {key}")
        if view.get("trainer.gradient_clip_val") is None:
            yield view.error(
                f"model.optim.name={name} needs trainer.gradient_clip_val", "use 0.0 for training without clipping"
            )
    if name == "distributed_fused_adam":
        if view.get("model.optim.disable_distributed_parameters", False):
            yield view.error(
                "model.optim.disable_distributed_parameters=True turns sharding off", "use model.optim.name=fused_adam"
            )
        dtype = str(view.get("model.optim.dtype", "float32"))
        if dtype.removeprefix("torch.") not in ("float32", "fp32", "32"):
            yield view.error(f"model.optim.dtype={dtype}: optimizer state is kept in float32", "use float32")
        scheme = view.get("model.peft.peft_scheme", "none")
        if view.size(EP) > 1:
            yield view.error(f"{EP}={view.size(EP)} with model.optim.name={name}", "use mcore_distributed_optim")
        if scheme != "none":
            fix = "use fused_adam, or mcore_distributed_optim"
            yield view.error(f"model.peft.peft_scheme={scheme} with model.optim.name={name}", fix)


def overlapped(view: View) -> Errors:
    """NeMo's GPT gathers weights while it computes only where it reduces gradients so."""
    key, other = "model.optim.overlap_param_sync", "model.optim.overlap_grad_sync"
    encoder = view.get("model.mcore_bert", False) or view.get("model.mcore_t5", False)
    if view.training and not encoder and view.get(key, False) and not view.get(other, False):
        yield view.error(f"{key}=True without {other}=True", "set both or neither")


def precision(view: View) -> Errors:
    """Trainium trains in bf16 or fp32, not in fp16 or fp8."""
    for key in ("trainer.precision", "model.precision"):
        value = view.get(key)
        if value is None or key in view.interpolated or value in (*BF16, *FP32):
            continue
        if value not in FP16:
            yield view.error(f"{key}={value} is no precision of NeMo's Megatron models", f"use {key}=bf16 or 32")
        elif view.training:
            yield view.error(f"{key}={value} trains in fp16, which this backend does not do", f"use {key}=bf16")
    for key in ("model.fp8", "model.fp8_params"):
        if view.get(key, False):
            yield view.error(f"{key}={view.get(key)} is not supported: there is no fp8 training here", "use False")


def megatron_core(view: View) -> Errors:
    """Models are megatron-core's; NeMo falls back to its own, legacy ones when the key is absent."""
    if not view.training or view.has("model.retro"):
        return
    key, name = _core_switch(view)
    if key and not view.get(key, False):
        state = "=False" if view.has(key) else " is not set"
        yield view.error(
            f"{key}{state}: NeMo's legacy {name} does not run on this backend",
            f"use {key}=True, and convert a legacy checkpoint to megatron-core first",
        )


def encoder_decoder_stages(view: View) -> Errors:
    """NeMo builds megatron-core's T5 whole on each stage: it does not hand on which half a stage has."""
    stages = view.size(PP)
    if view.training and view.get("model.mcore_t5", False) and stages > 1:
        yield view.error(f"{PP}={stages}: NeMo does not cut megatron-core's T5 into stages", f"use {PP}=1 and {TP}")


def _core_switch(view: View) -> tuple[str, str]:
    """The key that chooses megatron-core for this config's model, and the model's name; empty where there is none."""
    if view.has("model.encoder.arch") and view.has("model.decoder.arch"):
        return "model.mcore_t5", "encoder-decoder"
    if view.has("model.mcore_bert") or view.has("model.bert_binary_head"):
        return "model.mcore_bert", "BERT"
    decoder = ("model.num_layers", "model.num_attention_heads", "model.encoder_seq_length")
    if all(view.has(key) for key in decoder) and not view.has("model.mcore_t5"):
        return "model.mcore_gpt", "GPT"
    return "", ""


def data_files(view: View) -> Errors:
    """The pretraining data is named and there."""
    if view.training:
        yield from prefix_errors(view)


def tokenizer_files(view: View) -> Errors:
    """NeMo keeps the tokenizer's files with the model, whichever its library reads; a .nemo file has its own."""
    if not view.training or view.get("model.restore_from_path"):
        return
    for name in ("model", "vocab_file", "merge_file"):
        key = f"model.tokenizer.{name}"
        file = view.get(key)
        if isinstance(file, str) and file and not file.startswith("nemo:") and not os.path.exists(file):
            yield view.here(f"{key}={file} does not exist", "give the path of the tokenizer's file")


def heads(view: View) -> Errors:
    """Query groups divide the attention heads."""
    count, groups = view.number("model.num_attention_heads"), view.number("model.num_query_groups")
    if count and groups and count % groups:
        reason = f"model.num_query_groups={groups} does not divide model.num_attention_heads={count}"
        yield view.error(reason, f"use {or_list(divisors(count))}")


def learning_rates(view: View) -> Errors:
    """A schedule goes down to its least rate, and not past the last step."""
    if not view.training:
        return
    peak, least = _rate(view, "model.optim.lr"), _rate(view, "model.optim.sched.min_lr")
    if peak is not None and least is not None and least > peak:
        yield view.error(f"model.optim.sched.min_lr={least} is more than model.optim.lr={peak}", "use less")


def _rate(view: View, key: str) -> float | None:
    try:
        return float(view.get(key))
    except (TypeError, ValueError):
        return None


def position_table(view: View) -> Errors:
    """Learned positions are as many as the sequence is long."""
    length, most = view.number("model.encoder_seq_length"), view.number("model.max_position_embeddings")
    learned = view.get("model.position_embedding_type", "learned_absolute") == "learned_absolute"
    if learned and length and most and length > most:
        reason = f"model.encoder_seq_length={length} is more than model.max_position_embeddings={most}"
        yield view.error(reason, "raise model.max_position_embeddings")


def checkpoint_ranks(view: View) -> Errors:
    """A number of ranks, most often an interpolation of sizes that have rules of their own."""
    key = "exp_manager.checkpoint_callback_params.model_parallel_size"
    value, wrong = view.get(key), [size for size in (TP, PP) if view.has(size) and (view.number(size) or 0) < 1]
    if value is not None and not wrong and (view.number(key) or 0) < 1:
        yield view.error(f"{key}={value} is not a number of ranks", "use the product of the model's parallel sizes")


def workflows(view: View) -> Errors:
    """Tuning: what its sections need of each other."""
    yield from _preferences(view)
    scheme = view.get("model.peft.peft_scheme", "none")
    if scheme == "lora" and view.training and not view.get("model.peft.lora_tuning"):
        yield view.error("model.peft.peft_scheme=lora without model.peft.lora_tuning", "write the section")
    encoder = view.get("model.mcore_bert") is not None or view.get("model.mcore_t5") is not None
    if encoder and view.get("model.data.train_ds") is not None and view.get("model.mcore_bert", False):
        yield view.error("model.data.train_ds with model.mcore_bert: NeMo tunes decoders", "use a GPT")


def _preferences(view: View) -> Errors:
    """DPO and ORPO: where their data is, and a prompt that leaves room for an answer."""
    for name in view.preferences if view.training else ():
        key = f"neuron.alignment.{name}.max_prompt_length"
        length, prompt = view.number("model.encoder_seq_length"), view.number(key)
        if length and prompt and prompt >= length:
            reason = f"{key}={prompt} leaves no room in model.encoder_seq_length={length}"
            yield view.error(reason, f"use less, {length // 2} for instance")
        if view.get("model.data.train_ds") is None:
            reason = f"neuron.alignment.{name} without model.data.train_ds"
            yield view.error(reason, "name jsonl files in model.data.train_ds.file_names")


ERRORS: tuple[Callable[[View], Errors], ...] = (
    positive_sizes,
    heads,
    learning_rates,
    position_table,
    checkpoint_ranks,
    targets,
    workflows,
    accelerator,
    precision,
    not_here,
    names,
    sharded_optimizers,
    overlapped,
    megatron_core,
    encoder_decoder_stages,
    tensor_parallel,
    pipeline_parallel,
    *pipeline_layout.ERRORS,
    interleaved,
    experts,
    sequence_parallel,
    sequence_parallel_alone,
    context_parallel,
    world,
    *batches.ERRORS,
    data_files,
    tokenizer_files,
    *layers.ERRORS,
    *expert_rules.ERRORS,
    *exp_manager.ERRORS,
)


# --- what NeMo settles by itself, without a word or with one in a log that is long


def head_size(view: View) -> Errors:
    """megatron-core rounds the size of a head down."""
    hidden, count = view.number("model.hidden_size"), view.number("model.num_attention_heads")
    if hidden and count and hidden % count and view.number("model.kv_channels") is None:
        reason = f"model.num_attention_heads={count} does not divide model.hidden_size={hidden}"
        yield view.error(reason, "set model.kv_channels, the size of a head")


def warm_up(view: View) -> Errors:
    """A warm-up that the run does not outlast."""
    steps, most = view.number("model.optim.sched.warmup_steps"), view.number("trainer.max_steps")
    if view.training and steps and most and most > 0 and steps > most:
        yield view.error(f"model.optim.sched.warmup_steps={steps} of trainer.max_steps={most}", "warm up for less")


def lengths(view: View) -> Errors:
    """Data of another length than the model is told."""
    model, data = view.number("model.encoder_seq_length"), view.number("model.data.seq_length")
    if model and data and model != data:
        reason = f"model.data.seq_length={data} with model.encoder_seq_length={model}"
        yield view.error(reason, "use ${model.encoder_seq_length}")


def recomputed_nothing(view: View) -> Errors:
    """How to recompute, and nothing to recompute."""
    for side in ("model",):
        method = view.get(f"{side}.activations_checkpoint_method")
        if method is not None and view.get(f"{side}.activations_checkpoint_granularity") is None:
            key = f"{side}.activations_checkpoint_method"
            yield view.error(f"{key}={method} without activations_checkpoint_granularity", "set both or neither")


def dangling(view: View) -> Errors:
    """Interpolations of a key that is not there."""
    for key, why in view.dangling.items():
        yield view.error(f"{key}={view.written(key)}: {why}")


DOUBTS: tuple[Callable[[View], Errors], ...] = (
    head_size,
    warm_up,
    lengths,
    recomputed_nothing,
    names_of_others,
    exp_manager.consumed_samples,
    dangling,
)


def half_to_bf16(view: View) -> Changes:
    """Inference and evaluation in fp16 become bf16."""
    for key in ("trainer.precision", "model.precision"):
        value = view.get(key)
        if not view.training and value in FP16 and key not in view.interpolated:
            new = "bf16-mixed" if str(value).endswith("-mixed") else "bf16"
            yield Change(key, value, new, "fp16 is not computed on this backend")


def o2_needs_half(view: View) -> Changes:
    """NeMo's O2 with precision 32 ends in an obscure error."""
    value = view.get("trainer.precision", view.get("model.precision"))
    if view.get("model.megatron_amp_O2", False) and value in FP32:
        why = f"O2 keeps 16-bit weights, which trainer.precision={value} does not have"
        yield Change("model.megatron_amp_O2", True, False, why)


def asynchronous_gradients(view: View) -> Changes:
    """O2's overlapped all-reduce, on unless it is turned off, never waits for its collectives."""
    half = view.get("trainer.precision", view.get("model.precision")) not in FP32
    key = "model.async_grad_allreduce"
    if view.training and half and view.get("model.megatron_amp_O2", False) and view.get(key, True):
        why = "gradients are reduced after the backward pass: upstream waits for CUDA only"
        yield Change(key, view.get(key, "True (default)"), False, why)


def data_as_list(view: View) -> Changes:
    """NeMo reads a data_prefix given as text letter by letter; mock data needs the key to be there."""
    key = "model.data.data_prefix"
    if not view.has("model.data"):
        return
    if view.get("model.data.data_impl") == "mock":
        if view.has(key) and view.get(key) is None and view.raw(key) is not None:
            yield Change(key, view.raw(key), None, "mock data has no files")
        return
    value = view.get(key)
    listed = {name: as_list(part) for name, part in value.items()} if isinstance(value, dict) else as_list(value)
    if value is not None and listed != value:
        yield Change(key, value, listed, "NeMo expects a list and reads text letter by letter")


def bucket_bytes(view: View) -> Changes:
    """The size of a bucket in bytes, which megatron-core counts in elements; without overlap it makes one bucket."""
    key, size = "model.optim.ddp_bucket_size", view.number(BUCKET) or view.get("model.optim.bucket_cap_mb")
    sharded = view.training and view.get("model.optim.name") == "mcore_distributed_optim"
    if not sharded or not view.get("model.optim.overlap_grad_sync", False) or view.get(key) is not None:
        return
    if isinstance(size, int | float) and size > 0:
        bytes_each = 4 if view.get("model.optim.grad_sync_dtype", "fp32") == "fp32" else 2
        elements = max(1, int(size * 2**20 / bytes_each))
        yield Change(key, None, elements, f"model.optim.bucket_cap_mb={size}, in elements of {bytes_each} bytes")


def bucket_of_collectives(view: View) -> Changes:
    """The key of `neuron:` for bytes of a reduction of gradients, as the optimizer's own key."""
    size = view.number(BUCKET)
    if size is None or not view.training:
        return
    sharded = view.get("model.optim.name") in SHARDED
    key = "model.optim.bucket_cap_mb" if sharded else "model.grad_allreduce_chunk_size_mb"
    if view.get(key) != size:
        yield Change(key, view.get(key), size, f"{BUCKET}={size}, MiB of one reduction")


def lightnings_sampler(view: View) -> Changes:
    """The name that Lightning 1 had for a key: 2 refuses it, and NeMo's megatron_gpt_validate_config.yaml has it."""
    old, new = "trainer.replace_sampler_ddp", "trainer.use_distributed_sampler"
    if not view.has(old):
        return
    value = view.get(old)
    yield Change(old, value, GONE, f"Lightning 2 calls it {new.removeprefix('trainer.')}")
    if value is not None and not view.has(new):
        yield Change(new, None, value, f"Lightning 2's name of {old.removeprefix('trainer.')}")


CHANGES: tuple[Callable[[View], Changes], ...] = (
    lightnings_sampler,
    half_to_bf16,
    o2_needs_half,
    asynchronous_gradients,
    data_as_list,
    bucket_of_collectives,
    bucket_bytes,
    *pipeline_layout.CHANGES,
    *expert_rules.CHANGES,
)
