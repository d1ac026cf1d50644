"""What is worked out of several keys: their keys on the left, NeMo's on the right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.checkpoint.dialects.nemo_config import config_of
from nxdt_nemo.checkpoint.dtypes import FLOAT32
from nxdt_nemo.checkpoint.formats.hf import model_of
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.config.migrate import Options, migrate
from nxdt_nemo.config.validate import validate
from nxdt_nemo.errors import ConfigError, UserError

NXDT, NNM = (
    {"distributed_strategy.zero1": True, "precision.type": "fp32"},
    {"trainer.accelerator": "tpu", "model.seed": 1},
)
OPTIM = {"model.optim.name": "adamw"}
ABSENT = object()
DATA = Path(__file__).parent / "data"


def nest(flat):
    cfg = OmegaConf.create({})
    for key, value in flat.items():
        OmegaConf.update(cfg, key, value)
    return OmegaConf.to_yaml(cfg)


def select(cfg, path):
    """The value as written, ABSENT if there is none."""
    node = OmegaConf.to_container(cfg, resolve=False)
    for part in path.split("."):
        node = node.get(part, ABSENT) if isinstance(node, dict) else ABSENT
    return node


def run(base, keys, **options):
    found = migrate(nest(base | keys), Options(findings=False, **options))
    return OmegaConf.create(found.text), found.report


CASES = [  # dialect, their keys, NeMo's
    (NXDT, {"precision.type": "mixed_precision"},
     {"trainer.precision": "bf16", "model.megatron_amp_O2": True, "neuron": ABSENT}),
    (NXDT, {"precision.type": "mixed_precision_SR"},
     {"neuron.stochastic_rounding": True, "model.megatron_amp_O2": True}),
    (NXDT, {"precision.type": "mixed_precisionSR"}, {"neuron.stochastic_rounding": True}),
    (NXDT, {"precision.type": "autocast"}, {"trainer.precision": "bf16", "model.megatron_amp_O2": True}),
    (NXDT, {"precision.type": "bf16SR"}, {"trainer.precision": "bf16", "neuron.stochastic_rounding": True}),
    (NXDT, {"precision.type": "fp32"}, {"trainer.precision": 32, "model.megatron_amp_O2": False, "neuron": ABSENT}),
    (NXDT, {"precision.type": "manual", "precision.xla_downcast_bf16": "1", "precision.master_weights": True},
     {"trainer.precision": "bf16", "model.megatron_amp_O2": True, "precision": ABSENT}),
    (NXDT, {"precision.type": "manual", "precision.xla_use_bf16": "0"}, {"trainer.precision": 32}),
    (NXDT, OPTIM, {"model.optim.name": "mcore_distributed_optim"}),
    (NXDT, {"model.optim.name": "adamw_fp32OptState"}, {"model.optim.name": "mcore_distributed_optim"}),
    (NXDT, OPTIM | {"distributed_strategy.zero1": False, "bucket_size_collectives": 512},
     {"model.optim.name": "adamw", "neuron.bucket_size_collectives": 512}),
    (NXDT, {"model.sliding_window_size": 4096}, {"model.window_size": [4095, 0]}),
    (NXDT, {"model.moe.dropless": True, "model.moe.capacity_factor": 2.0}, {"model.moe_expert_capacity_factor": None}),
    (NXDT, {"model.moe.dropless": False, "model.moe.capacity_factor": 2.0},
     {"model.moe_expert_capacity_factor": 2.0, "model.moe_token_drop_policy": "position"}),
    (NXDT, {"model.moe.routing_algorithm": "top_k", "model.moe.router_aux_loss_coef": 0.02},
     {"model.moe_router_load_balancing_type": "aux_loss", "model.moe_aux_loss_coeff": 0.02}),
    (NXDT, {"model.moe.routing_algorithm": "sinkhorn"}, {"model.moe_router_load_balancing_type": "sinkhorn"}),
    (NXDT, {"model.moe.normalize_top_k_affinities": False}, {"model.moe_router_pre_softmax": True}),
    (NXDT, {"model.activations_checkpoint_granularity": "selective",
            "model.activations_checkpoint_recompute": ["CoreAttention", "LlamaMLP", "LlamaRMSNorm"]},
     {"model.recompute_modules": ["core_attn", "mlp", "layernorm"]}),
    (NXDT, {"model.activations_checkpoint_granularity": "full", "model.activations_checkpoint_recompute": None},
     {"model.activations_checkpoint_method": "uniform", "model.activations_checkpoint_num_layers": 1}),
    (NXDT, {"model.num_layers": 126, "distributed_strategy.pipeline_model_parallel_size": 4},
     {"model.pipeline_model_parallel_layout": f"E{'t' * 31}|{'t' * 31}|{'t' * 32}|{'t' * 32}L"}),
    (NXDT, {"model.num_layers": 8, "distributed_strategy.pipeline_model_parallel_size": 4},
     {"model.pipeline_model_parallel_layout": ABSENT}),
    (NXDT, {"model.fusions.softmax": True}, {"model.masked_softmax_fusion": True, "neuron.fuse_softmax": True}),
    (NXDT, {"model_alignment_strategy.dpo.kl_beta": 0.02}, {"neuron.alignment.dpo.kl_beta": 0.02}),
    (NXDT, {"data.packing": True, "data.use_sft_style_data_module": True, "data.train_dir": "/x.jsonl"},
     {"neuron.alignment.sft.packing": True, "model.data.train_ds.file_names": ["/x.jsonl"]}),
    (NXDT, {"model_alignment_strategy.peft.lora_rank": 8, "model_alignment_strategy.peft.target_modules": ["qkv_proj"]},
     {"model.peft.peft_scheme": "lora", "model.peft.lora_tuning.adapter_dim": 8,
      "model.peft.lora_tuning.target_modules": ["attention_qkv"]}),
    (NXDT, {"model_alignment_strategy.peft.lora_dropout": 0.0},
     {"model.peft.lora_tuning.adapter_dim": 16, "model.peft.lora_tuning.alpha": 32,
      "model.peft.lora_tuning.dropout_position": "pre",
      "model.peft.lora_tuning.adapter_dropout": 0.0, "model.peft.lora_tuning.target_modules": ["attention_qkv"]}),
    (NXDT, {"exp_manager.resume_from_checkpoint": "/c", "model.weight_init_only": True},
     {"model.restore_from_path": "/c", "exp_manager.resume_from_checkpoint": ABSENT}),
    (NXDT, {"exp_manager.resume_if_exists": True, "exp_manager.checkpoint_callback_params.save_last": False},
     {"exp_manager.checkpoint_callback_params.save_last": True}),
    (NXDT, {"exp_manager.resume_if_exists": False, "exp_manager.checkpoint_callback_params.save_last": False},
     {"exp_manager.checkpoint_callback_params.save_last": False}),
    (NXDT, {"exp_manager.checkpoint_callback_params.every_n_train_steps": 10},
     {"exp_manager.checkpoint_callback_params.every_n_epochs": None}),
    (NXDT, {"data.train_dir": "/tokens", "data.val_dir": "/held"},
     {"model.data.data_prefix": {"train": ["/tokens"], "validation": ["/held"]}, "model.data.data_impl": "arrow",
      "model.data.train_dir": ABSENT}),
    (NNM, {"model.wrap_with_zero": True} | OPTIM, {"model.optim.name": "mcore_distributed_optim"}),
    (NNM, {"model.wrap_with_zero": False} | OPTIM, {"model.optim.name": "adamw", "model.wrap_with_zero": ABSENT}),
    (NNM, {"trainer.precision": 32, "model.zero_use_master_weight": True}, {"trainer.precision": "bf16"}),
    (NNM, {"model.num_layers": 2, "model.encoder_seq_length": 8}, {"model.mcore_gpt": True}),
    (NNM, {"model.attention_type": "multiquery"}, {"model.num_query_groups": 1, "model.attention_type": "multihead"}),
    (NNM, {"model.num_layers": 18, "model.pipeline_model_parallel_size": 3,
           "model.flexible_pipeline_parallel_stages": "0:4,1:10,-1:4"},
     {"model.pipeline_model_parallel_layout": "Etttt|tttttttttt|ttttL"}),
    (NNM, {"model.data.fim_rate": 0.5, "model.data.fim_spm_rate": 0.1},
     {"model.data.fim.rate": 0.5, "model.data.add_fim": True, "model.data.fim.extra_tokens.eod": "<|endoftext|>"}),
    (NNM, {"exp_manager.checkpoint_callback_params.train_time_interval": 3600},
     {"exp_manager.checkpoint_callback_params": ABSENT}),
    (NNM, {"exp_manager.name": "x", "model.resume_from_checkpoint": None},
     {"exp_manager.resume_from_checkpoint": "${model.resume_from_checkpoint}"}),
    (NNM, {"trainer.resume_from_checkpoint": "/c"}, {"exp_manager.resume_from_checkpoint": "/c"}),
    (NNM, {"model.activations_checkpoint_granularity": "selective", "model.activations_checkpoint_num_layers": 1},
     {"model.activations_checkpoint_num_layers": None}),
]  # fmt: skip


@pytest.mark.parametrize("base, keys, wanted", CASES, ids=lambda item: "-".join(item) if isinstance(item, dict) else "")
def test_derived(base, keys, wanted):
    found, report = run(base, keys)
    for path, value in wanted.items():
        assert select(found, path) == value, f"{path}\n{report.render()}"
    again = migrate(OmegaConf.to_yaml(found), Options(findings=False))
    assert OmegaConf.create(again.text) == found


TRAINING = [  # training_precision of train_setup.sh, trainer.precision, O2, rounding, optimizer
    ("bf16SR", "bf16", True, True, "adamw"),
    ("fp32_ZeroOptMaster", "bf16", True, True, "mcore_distributed_optim"),
    ("fp32_ZeroOptMasterGradAcc", "bf16", True, None, "mcore_distributed_optim"),
    ("megatron_amp_O2", "bf16", True, True, "adamw"),
    ("fp32_OptStates", "bf16", True, True, "adamw_fp32OptState"),
    ("fp32", 32, False, None, "adamw"),
]


@pytest.mark.parametrize("said, precision, masters, rounding, optimizer", TRAINING)
def test_training_precision_of_nnm(said, precision, masters, rounding, optimizer):
    keys = OPTIM | {"trainer.precision": 32, "model.megatron_amp_O2": False, "model.wrap_with_zero": False}
    found, _ = run(NNM, keys, training_precision=said)
    assert found.trainer.precision == precision
    assert found.model.megatron_amp_O2 is masters
    assert OmegaConf.select(found, "neuron.stochastic_rounding") is rounding
    assert found.model.optim.name == optimizer


def test_nnms_precision_is_a_question_until_it_is_said():
    _, report = run(NNM, {"trainer.precision": 32})
    (said,) = [entry for entry in report.entries if entry.key == "trainer.precision"]
    assert (said.action, said.level) == ("kept", "question")
    assert "--train-setup" in said.why


def test_a_config_json_of_hugging_face(tmp_path):
    file = tmp_path / "config.json"
    said = {"model_type": "llama", "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    file.write_text(json.dumps(said | {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_hidden_layers": 32}))
    keys = {"model_source": "hf", "model.model_config": str(file), "model.num_layers": 4, "model.rope_theta": 500000.0}
    found, report = run(NXDT, keys)
    model = found.model
    assert (model.ffn_hidden_size, model.num_attention_heads, model.num_query_groups) == (14336, 32, 8)
    assert (model.num_layers, model.rotary_base) == (4, 500000.0)  # the YAML comes first
    assert (model.normalization, model.bias, model.layernorm_epsilon) == ("rmsnorm", False, 1e-6)
    assert [entry.to for entry in report.entries if entry.level == "question"] == ["model.tokenizer.vocab_size"]


def test_a_config_json_that_is_elsewhere_is_asked_for(tmp_path):
    keys = {"model_source": "hf", "model.model_config": "/home/someone/config.json"}
    found, report = run(NXDT, keys)
    assert OmegaConf.is_missing(found.model, "num_attention_heads")
    assert any(entry.level == "question" and "--model-config" in entry.why for entry in report.entries)
    with pytest.raises(UserError, match="there is no such file"):
        run(NXDT, keys, model_config=tmp_path / "none.json")
    wrong = tmp_path / "config.json"
    wrong.write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="model_type=bert is no Llama"):
        run(NXDT, keys, model_config=wrong)
    wrong.write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        run(NXDT, keys, model_config=wrong)


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
    "initializer_range": 0.03, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = [  # model_type, its own keys, what NeMo calls them
    ("llama", {"rope_scaling": LLAMA3}, {"scale_positional_embedding": True, "scale_factor": 4.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"seq_len_interpolation_factor": 2.0}),
    ("mistral", {"sliding_window": 16, "head_dim": 32}, {"window_size": [15, 0], "kv_channels": 32}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, {"num_moe_experts": 8, "moe_router_topk": 2}),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, {"qkv_bias": True, "window_size": ABSENT}),
    ("qwen3", {}, {"qk_layernorm": True, "kv_channels": 128}),
]


@pytest.mark.parametrize("kind, own, wanted", FAMILIES, ids=[f"{kind}-{'-'.join(own)}" for kind, own, _ in FAMILIES])
def test_a_family_of_hugging_face(tmp_path, kind, own, wanted):
    """As the checkpoints' room has it, which reads the weights."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": kind, **SIZES, **own}))
    found, report = run(NXDT, {"model_source": "hf", "model.model_config": str(file), "data.train_dir": "/x"})
    for key, value in wanted.items():
        assert select(found, f"model.{key}") == value, report.render()
    assert found.model.init_method_std == 0.03
    assert (found.model.tokenizer.library, found.model.tokenizer.vocab_size) == ("null", 512)
    assert [entry.to for entry in report.entries if entry.level == "question"] == []
    _, model = model_of(file)
    theirs = config_of(model, Layout(), {}, FLOAT32)
    same = theirs.keys() & found.model.keys() - {"megatron_amp_O2", "precision"}
    assert {"num_query_groups", "layernorm_epsilon", "rotary_base"} <= same
    assert {key: found.model[key] for key in same} == {key: theirs[key] for key in same}


@pytest.mark.parametrize(
    "own, said",
    [
        ({"model_type": "gemma"}, "model_type=gemma is no Llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling of type yarn"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, "from layer 28 on"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, "high_freq_factor=8.0"),
    ],
    ids=["gemma", "yarn", "biases", "window", "llama3"],
)
def test_what_a_config_json_says_and_nemo_cannot(tmp_path, own, said):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **SIZES, **own}))
    with pytest.raises(ConfigError, match=re.escape(said)) as found:
        run(NXDT, {"model_source": "hf", "model.model_config": str(file)})
    assert found.value.place == str(file)


ERRORS = [  # dialect, their keys, the key that is an error
    (NXDT, {"precision.type": "fast"}, "precision.type"),
    (NXDT, {"model.optim.name": "sgd"}, "model.optim.name"),
    (
        NXDT,
        {"model_alignment_strategy.peft.target_modules": ["lm_head"]},
        "model_alignment_strategy.peft.target_modules",
    ),
    (NXDT, {"model_alignment_strategy.peft.lora_bias": "all"}, "model_alignment_strategy.peft.lora_bias"),
    (NXDT, {"model.moe.dropout": 0.1}, "model.moe.dropout"),
    (NNM, {"model.transformer_block_type": "gpt_j"}, "model.transformer_block_type"),
    (NNM, {"model.save_logits": True}, "model.save_logits"),
    (NNM, {"model.flexible_pipeline_parallel_stages": "half"}, "model.flexible_pipeline_parallel_stages"),
    (NNM, {"name": "megatron_bart"}, "name"),
]


@pytest.mark.parametrize("base, keys, wrong", ERRORS, ids=lambda item: item if isinstance(item, str) else "")
def test_what_cannot_be_is_an_error_at_its_key(base, keys, wrong):
    _, report = run(base, keys)
    assert [entry.key for entry in report.entries if entry.level == "error"] == [wrong]


FILES = {"data.train_dir": "/x/train.jsonl", "data.val_dir": "/x/held.jsonl"}
TUNED = [  # their keys, what is left to a person
    ({"model_alignment_strategy.sft.packing": False, **FILES}, ["model.restore_from_path"]),
    (
        {"model_alignment_strategy.peft.lora_rank": 8, "model_alignment_strategy.peft.lora_dropout": 0.1, **FILES},
        ["model.restore_from_path"],
    ),
    (
        {"model_alignment_strategy.dpo.kl_beta": 0.1, "data.train_dir": "/x/train.jsonl", "data.val_dir": None},
        ["model.restore_from_path"],
    ),
    ({"model_alignment_strategy.orpo.beta": 0.1, **FILES}, ["model.restore_from_path"]),
]


@pytest.mark.parametrize("keys, asked", TUNED, ids=["sft", "lora", "dpo", "orpo"])
def test_tuning_validates(keys, asked, tmp_path):
    theirs = OmegaConf.load(DATA / "small_nxdt.yaml")
    for key, value in keys.items():
        OmegaConf.update(theirs, key, value)
    found = migrate(OmegaConf.to_yaml(theirs))
    assert found.report.errors == []
    (tmp_path / "tuning.yaml").write_text(found.text)
    said = validate(tmp_path / "tuning.yaml", strict=True)
    assert [str(error) for error in said.errors] == []
    assert set(asked) <= set(said.to_be_set)
    assert migrate(found.text).text == found.text
