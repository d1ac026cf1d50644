"""Each rule that needs more than one key: the line that it prints, and that it keeps silent otherwise."""

from __future__ import annotations

import pytest

from nxdt_nemo.config import check, sanitise
from nxdt_nemo.config.checks import OPTIMIZERS
from nxdt_nemo.config.report import or_list
from nxdt_nemo.errors import HereError

TP = "model.tensor_model_parallel_size"
PP = "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
EP = "model.expert_model_parallel_size"
NO_BIAS = "++model.bias=False"  # experts have none
FOUR = ["model.num_layers=4"]
CP = "model.context_parallel_size"

MCORE_ZERO = [
    "model.optim.name=mcore_distributed_optim",
    "+model.optim.weight_decay=0.1",
    "+model.optim.betas=[0.9,0.98]",
    "++trainer.gradient_clip_val=1.0",
]
WRONG = [  # overrides, ranks, the line
    ([f"{TP}=3"], 3, f"{TP}=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8"),
    (
        [f"{TP}=3", "model.num_query_groups=2"],
        3,
        f"{TP}=3 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8",
    ),
    (
        [f"{TP}=4", "model.num_attention_heads=24", "model.num_query_groups=6", "model.hidden_size=192"],
        4,
        f"{TP}=4 neither divides model.num_query_groups=6 nor is a multiple of it; use 1, 2, 3, 6, 12 or 24",
    ),
    (
        [f"{TP}=4", "model.ffn_hidden_size=130"],
        4,
        f"{TP}=4 does not divide model.ffn_hidden_size=130; use a multiple of 4",
    ),
    ([f"{TP}=0"], 1, f"{TP}=0 is not a positive whole number"),
    ([f"{TP}=two"], 1, f"{TP}=two is not a positive whole number"),
    ([f"{PP}=3"], 3, f"{PP}=3 does not divide model.num_layers=4; use 1, 2 or 4"),
    (
        [f"{PP}=2", "model.num_layers=4", "+model.account_for_loss_in_pipeline_split=True"],
        2,
        f"{PP}=2 does not divide model.num_layers=4 as its uneven stages ask; leave 2 stages a multiple of 2 layers",
    ),
    ([f"{TP}=2"], 3, f"3 ranks are not divisible by {TP}=2; use a multiple of 2 ranks"),
    ([f"{TP}=2", f"{PP}=2"], 6, f"6 ranks are not divisible by {TP}=2 x {PP}=2; use a multiple of 4 ranks"),
    (
        ["model.global_batch_size=7"],
        None,
        "model.global_batch_size=7 is not divisible by model.micro_batch_size=2; use 6 or 8",
    ),
    (
        ["model.global_batch_size=6"],
        2,
        "model.global_batch_size=6 is not divisible by model.micro_batch_size=2 x 2 data-parallel ranks; use 4 or 8",
    ),
    (
        [f"{TP}=2", "model.sequence_parallel=True", "model.encoder_seq_length=63"],
        2,
        f"model.sequence_parallel=True needs {TP}=2 to divide model.encoder_seq_length=63; use a multiple of 2",
    ),
    (
        ["model.sequence_parallel=True"],
        1,
        f"model.sequence_parallel=True needs {TP} above 1; use model.sequence_parallel=False",
    ),
    (
        [f"+{CP}=2", "model.encoder_seq_length=66"],
        2,
        f"{CP}=2 cuts the sequence into 4 pieces, which do not divide model.encoder_seq_length=66; use a multiple of 4",
    ),
    (
        [f"+{CP}=2", f"{TP}=2", "model.sequence_parallel=True", "model.encoder_seq_length=68"],
        4,
        f"{CP}=2 cuts the sequence into 8 pieces, which do not divide model.encoder_seq_length=68; use a multiple of 8",
    ),
    ([f"{VPP}=2"], 1, f"{VPP}=2 needs a pipeline, and {PP} is 1; use {VPP}=null"),
    ([f"{PP}=2", f"{VPP}=3", *FOUR], 2, f"{VPP}=3 x {PP}=2 does not divide model.num_layers=4; use {VPP}=2"),
    (
        [f"{PP}=2", f"{VPP}=2", *FOUR, "model.megatron_amp_O2=False"],
        2,
        f"{VPP}=2 trains with model.megatron_amp_O2=True only, says NeMo; set both or neither",
    ),
    (
        [f"{PP}=4", f"{VPP}=2", "model.num_layers=8", "model.global_batch_size=12"],
        4,
        f"{VPP}=2: {PP}=4 does not divide the 6 micro-batches of a step; "
        "use a model.global_batch_size that gives a multiple of 4",
    ),
    ([f"+{EP}=2"], 2, f"{EP}=2 without model.num_moe_experts; use {EP}=1, or say how many experts there are"),
    (
        [f"+{EP}=2", "+model.num_moe_experts=3", NO_BIAS],
        2,
        f"{EP}=2 does not divide model.num_moe_experts=3; use 1 or 3",
    ),
    (
        [f"+{EP}=2", "+model.num_moe_experts=4", NO_BIAS, "model.megatron_amp_O2=False"],
        2,
        f"{EP}=2 trains with model.megatron_amp_O2=True only, says NeMo; set both or neither",
    ),
    (
        ["+model.num_moe_experts=4", NO_BIAS, f"{TP}=2"],
        2,
        f"model.num_moe_experts=4 with {TP}=2 trains with sequence parallelism only; use model.sequence_parallel=True",
    ),
    (
        [f"+{EP}=2", "+model.num_moe_experts=4", NO_BIAS, f"{TP}=2", "model.sequence_parallel=True"],
        2,
        f"2 ranks are not divisible by {TP}=2 x {PP}=1 x {EP}=2; use a multiple of 4 ranks",
    ),
    (
        ["+model.fsdp=True"],
        1,
        "model.fsdp=True is not supported; use False: ranks beyond TP x PP are data parallel",
    ),
    (["model.optim.name=fusedadam"], 1, "model.optim.name=fusedadam is no optimizer; did you mean fused_adam?"),
    (
        ["model.optim.sched.name=CosineAnnealin"],
        1,
        "model.optim.sched.name=CosineAnnealin is no schedule; did you mean CosineAnnealing?",
    ),
    (
        ["model.optim.name=novograd"],
        1,
        "model.optim.name=novograd keeps one number a parameter, which a distributed checkpoint does not take; "
        f"use {or_list(OPTIMIZERS)}",
    ),
    (
        ["model.optim.name=distributed_fused_adam", "+model.optim.disable_distributed_parameters=True"],
        1,
        "model.optim.disable_distributed_parameters=True turns sharding off; use model.optim.name=fused_adam",
    ),
    (
        ["model.optim.name=distributed_fused_adam", "+model.optim.dtype=bf16"],
        1,
        "model.optim.dtype=bf16: optimizer state is kept in float32; use float32",
    ),
    (
        ["model.optim.name=distributed_fused_adam", f"+{EP}=2", "+model.num_moe_experts=4", NO_BIAS],
        2,
        f"{EP}=2 with model.optim.name=distributed_fused_adam; use mcore_distributed_optim",
    ),
    (
        ["model.optim.name=distributed_fused_adam", "+model.peft={peft_scheme: lora, lora_tuning: {alpha: 1}}"],
        1,
        "model.peft.peft_scheme=lora with model.optim.name=distributed_fused_adam; "
        "use fused_adam, or mcore_distributed_optim",
    ),
    (
        [*MCORE_ZERO, "+model.optim.overlap_param_sync=True"],
        1,
        "model.optim.overlap_param_sync=True without model.optim.overlap_grad_sync=True; set both or neither",
    ),
    (
        [*MCORE_ZERO, "model.optim.betas=null"],
        1,
        "model.optim.name=mcore_distributed_optim needs model.optim.betas; set model.optim.betas",
    ),
    (
        [*MCORE_ZERO, "++trainer.gradient_clip_val=null"],
        1,
        "model.optim.name=mcore_distributed_optim needs trainer.gradient_clip_val; "
        "use 0.0 for training without clipping",
    ),
    (
        ["model.mcore_gpt=False"],
        1,
        "model.mcore_gpt=False: NeMo's legacy GPT does not run on this backend; "
        "use model.mcore_gpt=True, and convert a legacy checkpoint to megatron-core first",
    ),
    (
        ["~model.mcore_gpt"],
        1,
        "model.mcore_gpt is not set: NeMo's legacy GPT does not run on this backend; "
        "use model.mcore_gpt=True, and convert a legacy checkpoint to megatron-core first",
    ),
    (
        ["~model.mcore_gpt", "+model.bert_binary_head=True"],
        1,
        "model.mcore_bert is not set: NeMo's legacy BERT does not run on this backend; "
        "use model.mcore_bert=True, and convert a legacy checkpoint to megatron-core first",
    ),
    (
        ["~model.mcore_gpt", "+model.mcore_t5=False", "+model.encoder={arch: transformer}", "+model.decoder={arch: x}"],
        1,
        "model.mcore_t5=False: NeMo's legacy encoder-decoder does not run on this backend; "
        "use model.mcore_t5=True, and convert a legacy checkpoint to megatron-core first",
    ),
    (
        ["trainer.precision=bf16-true"],
        1,
        "trainer.precision=bf16-true is no precision of NeMo's Megatron models; use trainer.precision=bf16 or 32",
    ),
    (["model.fp8=True"], 1, "model.fp8=True is not supported: there is no fp8 training here; use False"),
    (
        ["trainer.accelerator=hpu"],
        1,
        "trainer.accelerator=hpu is not known here; use neuron, gpu, cuda, auto, tpu or cpu",
    ),
]


@pytest.mark.parametrize(("overrides", "ranks", "line"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_wrong_config_is_one_line(errors, overrides, ranks, line):
    assert errors(*overrides, world_size=ranks) == [f"tiny_gpt.yaml: {line}"]


@pytest.mark.parametrize("name", ["model", "vocab_file", "merge_file"])
def test_a_tokenizers_file_that_is_not_here(gpt, name, corpus):
    """NeMo looks for each, also for one that the library does not read."""
    (error,) = check(gpt(f"+model.tokenizer.{name}=/nope.model")).errors
    assert isinstance(error, HereError)
    assert str(error) == f"model.tokenizer.{name}=/nope.model does not exist; give the path of the tokenizer's file"
    for there in (f"{corpus}.bin", "nemo:tokenizer.model", "''", "null"):
        assert check(gpt(f"+model.tokenizer.{name}={there}")).errors == []
    assert check(gpt(f"+model.tokenizer.{name}=/nope.model", "+model.restore_from_path=/a.nemo")).errors == []


def test_stages_of_a_t5_are_refused(errors):
    """Beside what a T5 lacks whose configuration was a GPT's."""
    line = f"tiny_gpt.yaml: {PP}=2: NeMo does not cut megatron-core's T5 into stages; use {PP}=1 and {TP}"
    of = ("~model.mcore_gpt", "+model.mcore_t5=True")
    assert line in errors(*of, f"{PP}=2", world_size=2)
    assert line not in errors(*of, world_size=1)


@pytest.mark.parametrize("precision", ["16", "'16'", "16-mixed", "fp16"])
def test_training_in_fp16_is_an_error_that_names_bf16(errors, precision):
    value = precision.strip("'")
    assert errors(f"trainer.precision={precision}") == [
        f"tiny_gpt.yaml: trainer.precision={value} trains in fp16, which this backend does not do; "
        "use trainer.precision=bf16"
    ]


@pytest.mark.parametrize(("asked", "used"), [("16", "bf16"), ("16-mixed", "bf16-mixed")])
def test_inference_in_fp16_warns_and_becomes_bf16(gpt, asked, used):
    cfg = gpt(f"trainer.precision={asked}", "+model.precision=${trainer.precision}")
    report = sanitise(cfg, training=False)
    assert report.errors == []
    assert report.warnings == [f"trainer.precision={asked}: this backend computes in {used} instead of fp16"]
    assert cfg.trainer.precision == cfg.model.precision == used


RIGHT = [  # overrides, ranks
    ([], None),
    ([], 1),
    ([f"{TP}=2"], 2),
    ([f"{TP}=2", "model.sequence_parallel=True"], 2),
    ([f"{TP}=2", f"{PP}=2"], 4),
    ([f"{TP}=2", f"{PP}=2"], 8),
    ([f"{TP}=2", "model.num_query_groups=2"], 2),
    ([f"{TP}=4", "model.num_query_groups=2"], 4),
    ([f"{TP}=8", "model.num_query_groups=2"], 8),
    ([f"{PP}=2", "model.num_layers=5", "+model.num_layers_in_first_pipeline_stage=2"], 2),
    ([f"{PP}=2", "model.num_layers=5", "+model.account_for_embedding_in_pipeline_split=True"], 2),
    (["+model.context_parallel_size=1", "model.virtual_pipeline_model_parallel_size=1"], 2),
    ([f"{PP}=2", f"{VPP}=2", *FOUR], 2),
    ([f"{PP}=2", f"{VPP}=2", *FOUR, f"{TP}=2"], 4),
    ([f"+{EP}=2", "+model.num_moe_experts=4", NO_BIAS], 2),
    ([f"+{EP}=2", "+model.num_moe_experts=4", NO_BIAS, *MCORE_ZERO], 2),
    ([*MCORE_ZERO, "+model.optim.overlap_param_sync=True", "+model.optim.overlap_grad_sync=True"], 1),
    ([f"+{CP}=2"], 2),
    ([f"+{CP}=2", f"{TP}=2", "model.sequence_parallel=True"], 4),
    (["trainer.precision=32"], 1),
    (["trainer.precision=bf16-mixed"], 1),
    (["model.optim.name=adamw"], 1),
    *([[f"trainer.accelerator={name}"], 1] for name in ("neuron", "gpu", "cuda", "auto", "tpu")),
]


@pytest.mark.parametrize(("overrides", "ranks"), RIGHT, ids=[" ".join(case[0]) or "as it is" for case in RIGHT])
def test_a_right_config_has_no_findings(gpt, overrides, ranks):
    report = check(gpt(*overrides), world_size=ranks)
    assert [str(error) for error in report.errors] == []
    assert report.warnings == []
    assert report.ignored == []


def test_a_validation_run_of_a_training_config_does_not_train(gpt):
    report = check(
        gpt(
            "+model.skip_train=True",
            "trainer.precision=16",
            "model.optim.name=mcore_distributed_optim",
        )
    )
    assert report.errors == []


def test_cpu_is_left_alone(gpt):
    report = check(gpt("trainer.accelerator=cpu", f"{TP}=3", "trainer.precision=16", "+model.no_such_key=1"))
    assert (report.errors, report.warnings, report.changes, report.ignored, report.unknown) == ([], [], [], [], [])


def test_o2_with_precision_32_is_turned_off(gpt):
    cfg = gpt("trainer.precision=32")
    (change,) = [change for change in sanitise(cfg).changes if change.key == "model.megatron_amp_O2"]
    assert (change.old, change.new) == (True, False)
    assert cfg.model.megatron_amp_O2 is False


def test_o2_stays_with_bf16(gpt):
    cfg = gpt()
    sanitise(cfg)
    assert cfg.model.megatron_amp_O2 is True


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ([], True),  # absent means True to NeMo
        (["+model.async_grad_allreduce=True"], True),
        (["+model.async_grad_allreduce=False"], False),
        (["model.megatron_amp_O2=False"], False),
        (["trainer.precision=32"], False),
    ],
)
def test_overlapped_gradients_are_turned_off_where_nemo_would_use_them(gpt, overrides, changed):
    cfg = gpt(*overrides)
    keys = [change.key for change in sanitise(cfg).changes]
    assert ("model.async_grad_allreduce" in keys) is changed
    assert cfg.model.get("async_grad_allreduce", "absent") in ((False,) if changed else (False, "absent"))


@pytest.mark.parametrize(
    ("overrides", "elements"),
    [
        (["+model.optim.overlap_grad_sync=True"], 400 * 2**18),
        (["+model.optim.overlap_grad_sync=True", "+model.optim.grad_sync_dtype=bf16"], 400 * 2**19),
        (["+model.optim.overlap_grad_sync=True", "+model.optim.ddp_bucket_size=7"], None),
        ([], None),  # without overlap megatron-core has one bucket
    ],
)
def test_the_bytes_of_a_bucket_become_elements(gpt, overrides, elements):
    """megatron-core counts elements, so that NeMo passes ddp_bucket_size and leaves bucket_cap_mb out."""
    cfg = gpt(*MCORE_ZERO, "+model.optim.bucket_cap_mb=400", *overrides)
    found = [change.new for change in sanitise(cfg).changes if change.key == "model.optim.ddp_bucket_size"]
    assert found == ([] if elements is None else [elements])
    assert cfg.model.optim.get("ddp_bucket_size") == (7 if "ddp_bucket_size" in "".join(overrides) else elements)


@pytest.mark.parametrize(
    "overrides, key",
    [
        (("model.optim.name=distributed_fused_adam", "+model.optim.bucket_cap_mb=100"), "model.optim.bucket_cap_mb"),
        (MCORE_ZERO, "model.optim.bucket_cap_mb"),
        (("model.optim.name=fused_adam",), "model.grad_allreduce_chunk_size_mb"),
    ],
)
def test_nxd_trainings_bucket_is_the_optimizers(gpt, overrides, key):
    cfg = gpt(*overrides, "+neuron.bucket_size_collectives='512'", "+model.optim.overlap_grad_sync=True")
    changes = {change.key: change.new for change in sanitise(cfg).changes}
    assert changes[key] == 512
    assert changes.get("model.optim.ddp_bucket_size") == (512 * 2**18 if overrides == MCORE_ZERO else None)
    assert sanitise(cfg).changes == []


def test_adapters_are_checked(errors):
    lora = ("+model.peft.peft_scheme=lora", "+model.peft.lora_tuning.alpha=1")
    assert errors(*lora) == []
    copies = (
        f"tiny_gpt.yaml: model.peft.peft_scheme=lora with copies of KV heads ({TP}=4, model.num_query_groups=2) "
        f"is not supported; use {TP} 1 or 2"
    )
    assert errors(f"{TP}=4", "model.num_query_groups=2", *lora, world_size=4) == [copies]
    assert errors("+model.peft.peft_scheme=null") == []
