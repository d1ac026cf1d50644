"""The table: each script of NeMo's examples/nlp/language_modeling with its commands, or with what refuses it.

In a word {data} is the folder of inputs.py, {run} the row's own folder, {rows} that of all rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts_lib import shown

__all__ = ["FOLDER", "ROWS", "Row"]

FOLDER = Path("examples/nlp/language_modeling")


@dataclass(frozen=True)
class Row:
    """A run of a script.

    script  below FOLDER, or below the checkout when it begins with "scripts/"; without .py
    shows   what came out
    words   its arguments
    layout  of its ranks
    needs   the rows, by name, whose files it reads
    ranks   of torchrun, where the script wants to be started by it; else 0
    """

    script: str
    shows: shown.Shows
    words: tuple[str, ...] = ()
    layout: str = "1 rank"
    needs: tuple[str, ...] = ()
    ranks: int = 0

    @property
    def name(self) -> str:
        """Of the row's folder, and as --rows has it."""
        layout = f" {self.layout}" if self.layout != "1 rank" else ""
        return re.sub(r"[ ,]+", "_", Path(self.script).name + layout)

    def path(self, checkout: Path) -> Path:
        """The script's file."""
        return checkout / ("" if self.script.startswith("scripts/") else FOLDER) / f"{self.script}.py"

    def filled(self, data: Path, run: Path, rows: Path) -> list[str]:
        """Its arguments with folders in them."""
        places = {"{data}": data, "{run}": run, "{rows}": rows}
        found = list(self.words)
        for mark, place in places.items():
            found = [word.replace(mark, str(place)) for word in found]
        return found


def split(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def without(start: str, words: Sequence[str]) -> tuple[str, ...]:
    """The words that do not begin like this."""
    return tuple(word for word in words if not word.startswith(start))


CPU = split("trainer.accelerator=neuron trainer.precision=32")
TRAIN = (
    *CPU,
    *split("trainer.devices=1 trainer.max_steps=6 trainer.log_every_n_steps=1 trainer.val_check_interval=3"),
    *split("++trainer.limit_val_batches=1 exp_manager.explicit_log_dir={run}/log"),
    "exp_manager.checkpoint_callback_params.filename='{step}-{consumed_samples}'",
    "++exp_manager.checkpoint_callback_params.save_nemo_on_train_end=True",
)
SIZES = split("num_layers=2 hidden_size=32 ffn_hidden_size=64 num_attention_heads=4")
PRETRAIN = (
    *TRAIN,
    *split("model.micro_batch_size=2 model.global_batch_size=4 model.optim.lr=2e-3 ++model.optim.sched.warmup_steps=1"),
    *split("++model.data.data_prefix=[1.0,{data}/text_document] model.data.index_mapping_dir={run}"),
    "model.data.splits_string='80,10,10'",
)
ONE_STACK = (
    *(f"model.{size}" for size in SIZES),
    *split("model.encoder_seq_length=64 model.megatron_amp_O2=False model.optim.sched.constant_steps=0"),
)
TWO_STACKS = (
    *(f"model.{side}.{size}" for side in ("encoder", "decoder") for size in SIZES),
    *(f"model.{side}.{kind}_dropout=0" for side in ("encoder", "decoder") for kind in ("hidden", "attention")),
    *split("model.embedding_dropout=0 model.seq_length=64 ++model.data.seq_length_dec=32 ++model.mcore_t5=True"),
    *split("++model.data.whole_word_masking=False model.make_vocab_size_divisible_by=64"),
)
SPM = split(
    "model.tokenizer.library=sentencepiece model.tokenizer.type=null model.tokenizer.model={data}/tokenizer.model"
)
TP2 = split("trainer.devices=2 model.tensor_model_parallel_size=2")
PP2 = split("trainer.devices=2 model.pipeline_model_parallel_size=2")

GPT = (*PRETRAIN, *ONE_STACK, *SPM)
LLAMA = (
    "--config-name=megatron_llama_config",
    *GPT,
    *split("trainer.precision=bf16 model.num_query_groups=2 model.megatron_amp_O2=True"),
)
BERT = (
    *PRETRAIN,
    *ONE_STACK,
    *split("model.hidden_dropout=0 ++model.attention_dropout=0 model.apply_query_key_layer_scaling=False"),
    *split(
        "model.make_vocab_size_divisible_by=64 model.tokenizer.library=huggingface model.tokenizer.type={data}/bert"
    ),
    "model.data.data_prefix=[1.0,{data}/bert_document]",
)
T5 = (*PRETRAIN, *TWO_STACKS, *SPM, "~model.optim.sched.warmup_ratio")
BART = without("++model.optim.sched.warmup_steps", (*PRETRAIN, *TWO_STACKS, *SPM))

GPT_RUN, LLAMA_RUN = "megatron_gpt_pretraining", "megatron_gpt_pretraining_Llama_bf16"
BERT_RUN, T5_RUN = "megatron_bert_pretraining", "megatron_t5_pretraining"
T5_MODEL = f"{{rows}}/{T5_RUN}/log/checkpoints/megatron_t5.nemo"
T5_TUNED = "model.restore_from_path={rows}/megatron_t5_seq2seq_finetune/log/checkpoints/megatron_t5_finetune.nemo"
LEARNS = 150  # steps in which a T5 learns a few answers by heart
THIRD, LAST = "step=3-consumed_samples=12.0", "step=6-consumed_samples=24.0-last"
GOES_ON = range(3, 6)


def from_third(run: str) -> str:
    """Go on from another run's third step, in whatever layout."""
    return f"+exp_manager.resume_from_checkpoint='{{rows}}/{run}/log/checkpoints/{THIRD}'"


def pairs(*parts: str) -> tuple[str, ...]:
    """Pairs of a few words as data of these parts."""
    return tuple(
        f"model.data.{part}.{word}"
        for part in parts
        for word in split("file_names=[{data}/short.jsonl] max_seq_length=64 global_batch_size=2 micro_batch_size=2")
    )


TUNE = (
    *TRAIN,
    *pairs("train_ds", "validation_ds"),
    *split("model.data.train_ds.concat_sampling_probabilities=[1.0] model.data.validation_ds.names=[short]"),
    *split("model.micro_batch_size=2 model.global_batch_size=2 model.optim.lr=1e-2 model.optim.sched.warmup_steps=1"),
)
LORA = split("model.peft.peft_scheme=lora model.peft.lora_tuning.adapter_dim=8")
SCHEMES = {"all weights": "none", "p-tuning": "ptuning", "adapters": "adapter", "IA3": "ia3"}
ALPHA = "++model.peft.lora_tuning.alpha=8"
ASK = (
    *CPU,
    *pairs("test_ds"),
    *split("model.micro_batch_size=2 model.global_batch_size=2 model.peft.peft_scheme=lora"),
    *split("model.data.test_ds.names=[short] model.data.test_ds.tokens_to_generate=8"),
    *split("model.data.test_ds.write_predictions_to_file=True model.data.test_ds.metric.name=exact_string_match"),
    "model.data.test_ds.output_file_path_prefix={run}/said",
)
SAID, PAIRS = "said_test_short_inputs_preds_labels.jsonl", 40
GPT_LORA = (
    "model.peft.restore_from_path={rows}/megatron_gpt_finetuning/log/checkpoints/megatron_gpt_peft_lora_tuning.nemo"
)
T5_LORA = "model.peft.restore_from_path={rows}/megatron_t5_finetuning/log/checkpoints/megatron_t5_peft_lora_tuning.nemo"
BASE = "model.restore_from_path={data}/llama.nemo"


def two_files(part: str) -> tuple[str, ...]:
    """A few pairs as a file of sources and one of targets."""
    files = split("src_file_name={data}/few.source.txt tgt_file_name={data}/few.target.txt")
    sizes = split("global_batch_size=4 micro_batch_size=4 max_src_seq_length=64 max_tgt_seq_length=32")
    return tuple(f"model.data.{part}.{word}" for word in (*files, *sizes))


EVAL = (
    *CPU,
    *split("gpt_model_file={data}/llama.nemo prompts=null prompts_jsonl={data}/prompts.jsonl"),
    *split("inference.greedy=True inference.tokens_to_generate=8 inference.min_tokens_to_generate=8"),
    *split("inference.repetition_penalty=1.0 inference.add_BOS=False pipeline_model_parallel_split_rank=0"),
    *split("tensor_model_parallel_size=1 pipeline_model_parallel_size=1"),
)
ONE_BY_ONE = split("--gpus_per_node 1 --tensor_model_parallel_size 1 --pipeline_model_parallel_size 1")
ANOTHER_MODEL = shown.refusal("use a model of megatron-core's GPT, BERT or T5 kind")

ROWS: tuple[Row, ...] = (
    Row("bert_pretraining", shown.refusal("lm_bert_dataset")),
    Row(
        "convert_weights_to_nemo1.0",
        shown.renamed("converted.pt"),
        (
            *split("--bert_encoder {data}/encoder.pt --bert_token_classifier {data}/classifier.pt"),
            *split("--output_path {run}/converted.pt"),
        ),
    ),
    Row("mamba_change_num_partition", ANOTHER_MODEL),
    Row("megatron_bart_pretraining", shown.losses(), BART),
    Row(BERT_RUN, shown.losses(), BERT),
    Row(
        BERT_RUN,
        shown.as_in(BERT_RUN, GOES_ON),
        (*BERT, *TP2, "model.sequence_parallel=True", "model.make_vocab_size_divisible_by=32", from_third(BERT_RUN)),
        "TP 2, SP",
        (BERT_RUN,),
    ),
    Row(BERT_RUN, shown.as_in(BERT_RUN, GOES_ON), (*BERT, *PP2, from_third(BERT_RUN)), "PP 2", (BERT_RUN,)),
    *(
        Row(
            "megatron_change_num_partitions",
            shown.tensors("out.nemo", of="llama.nemo", sizes=(tp, pp)),
            (
                *split("--model_file {data}/llama.nemo --target_file {run}/out.nemo --precision 32"),
                *split("--tokenizer_model_path {data}/tokenizer.model --num_gpu_per_node 1"),
                *split(f"--target_tensor_model_parallel_size {tp} --target_pipeline_model_parallel_size {pp}"),
            ),
            "to TP 2" if tp > 1 else "to PP 2",
        )
        for tp, pp in ((2, 1), (1, 2))
    ),
    Row(
        "megatron_ckpt_to_nemo",
        shown.tensors("out", of=LLAMA_RUN),
        (
            *split(f"--checkpoint_folder {{rows}}/{LLAMA_RUN}/log/checkpoints --checkpoint_name {LAST}"),
            *split(f"--hparams_file {{rows}}/{LLAMA_RUN}/log/hparams.yaml --nemo_file_path {{run}}/out"),
            *split("--no_pack_nemo_file --model_type gpt --precision bf16-mixed"),
            *ONE_BY_ONE,
        ),
        needs=(LLAMA_RUN,),
    ),
    Row("megatron_export", shown.refusal("ONNX")),
    Row("megatron_gpt_distillation", shown.refusal("Model Optimizer")),
    Row(
        "megatron_gpt_drop_layers",
        shown.layers("out.nemo", 2),
        (
            *split("--path_to_nemo {data}/llama.nemo --path_to_save {run}/out.nemo --drop_layers 2 3"),
            *split("--precision 32-true"),
            *ONE_BY_ONE,
        ),
    ),
    Row("megatron_gpt_eval", shown.tokens, EVAL),
    *(
        Row(
            "megatron_gpt_eval",
            shown.tokens,
            (
                *without("gpt_model_file=", EVAL),
                f"gpt_model_file={{rows}}/megatron_change_num_partitions_to_{size}_2/out.nemo",
                "trainer.devices=2",
                f"{key}=2",
            ),
            f"{size} 2",
            needs=(f"megatron_change_num_partitions_to_{size}_2",),
        )
        for size, key in (("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"))
    ),
    Row("megatron_gpt_mcore_batch_eval", shown.refusal("megatron_gpt_eval.py")),
    Row("megatron_gpt_pretraining", shown.losses(), GPT),
    Row("megatron_gpt_pretraining", shown.losses(), LLAMA, "Llama, bf16"),
    Row("megatron_gpt_prune", shown.refusal("megatron_gpt_drop_layers.py")),
    Row("megatron_gpt_ptq", shown.refusal("TensorRT-LLM")),
    Row("megatron_gpt_test", shown.refusal("megatron_gpt_validate.py")),
    Row(
        "megatron_gpt_validate",
        shown.said(r"val_loss +│ +(\S+) ", "val_loss"),
        (
            *CPU,
            f"gpt_model_file={{rows}}/{GPT_RUN}/log/checkpoints/megatron_gpt.nemo",
            *split(
                "tensor_model_parallel_size=1 pipeline_model_parallel_size=1 micro_batch_size=2 global_batch_size=4"
            ),
        ),
        needs=(GPT_RUN,),
    ),
    Row("megatron_griffin_finetuning", ANOTHER_MODEL),
    Row("megatron_griffin_generate", ANOTHER_MODEL),
    Row(
        "megatron_lm_ckpt_to_nemo",
        shown.tensors("out.nemo", of="llama.nemo"),
        (
            *split("--checkpoint_folder {data}/megatron_lm/release --checkpoint_name model_optim_rng.pt"),
            *split("--hparams_file {data}/hparams.yaml --nemo_file_path {run}/out.nemo --model_type gpt --mcore_input"),
            *split("--gpus_per_node 2 --tensor_model_parallel_size 2"),
        ),
        "TP 2",
        ranks=2,
    ),
    Row("megatron_mamba_eval", ANOTHER_MODEL),
    Row("megatron_retro_cal_shape", ANOTHER_MODEL),
    Row("megatron_retro_eval", ANOTHER_MODEL),
    Row("megatron_retro_eval_legacy", ANOTHER_MODEL),
    Row("megatron_retro_fine_tune", ANOTHER_MODEL),
    Row("megatron_retro_mutransfer_pretrain", ANOTHER_MODEL),
    Row("megatron_retro_pretraining", ANOTHER_MODEL),
    Row("megatron_retro_pretraining_legacy", ANOTHER_MODEL),
    Row("megatron_retro_qatask_eval", ANOTHER_MODEL),
    Row(
        "megatron_t5_eval",
        shown.completion,
        (
            *split(f"--model_file {T5_MODEL} --tokens_to_generate 8 --precision 32 --tensor_model_parallel_size 1"),
            *split("--pipeline_model_parallel_size 1 --pipeline_model_parallel_split_rank 0 --prompt"),
            "The value of",
        ),
        needs=(T5_RUN,),
    ),
    Row(
        "megatron_t5_lm_adaptation_finetune",
        shown.losses(),
        (
            *without("++model.optim.sched", PRETRAIN),
            *split(f"model.pretrained_model_path={T5_MODEL} model.tensor_model_parallel_size=1 ++model.seq_length=64"),
            *split("model.data.seq_length_dec=63 model.data.whole_word_masking=False ++model.bias_gelu_fusion=False"),
        ),
        needs=(T5_RUN,),
    ),
    Row(T5_RUN, shown.losses(), T5),
    Row(
        T5_RUN,
        shown.as_in(T5_RUN, GOES_ON),
        (*T5, *TP2, "model.make_vocab_size_divisible_by=32", from_third(T5_RUN)),
        "TP 2",
        (T5_RUN,),
    ),
    Row(T5_RUN, shown.refusal("does not cut"), (*T5, *PP2, "model.pipeline_model_parallel_split_rank=1"), "PP 2"),
    Row(
        "megatron_t5_seq2seq_eval",
        shown.answers("said_validation_dataloader0_inputs_preds_labels.jsonl", 8, right=True),
        (
            "--config-name=megatron_t5_config_finetune_eval",
            *CPU,
            *split("trainer.devices=1 ++trainer.limit_val_batches=2"),
            T5_TUNED,
            *two_files("validation_ds"),
            *split("model.data.validation_ds.write_predictions_to_file=True exp_manager.explicit_log_dir={run}/log"),
            "model.data.validation_ds.output_file_path_prefix={run}/said",
        ),
        needs=("megatron_t5_seq2seq_finetune",),
    ),
    Row(
        "megatron_t5_seq2seq_finetune",
        shown.losses(LEARNS),
        (
            "--config-name=megatron_t5_finetune",
            *without("exp_manager.checkpoint_callback_params", TRAIN),
            *split(f"model.restore_from_path={T5_MODEL} trainer.max_epochs=1 model.optim.lr=5e-3"),
            *split(f"trainer.max_steps={LEARNS} trainer.val_check_interval={LEARNS}"),
            *two_files("train_ds"),
            *two_files("validation_ds"),
        ),
        needs=(T5_RUN,),
    ),
    Row(
        "transformer_lm",
        shown.losses(3, "train_loss"),
        (
            *CPU,
            *split("trainer.devices=1 trainer.strategy=auto trainer.max_epochs=1 +trainer.max_steps=3"),
            *split("trainer.log_every_n_steps=1 +exp_manager.explicit_log_dir={run}/log model.encoder.inner_size=64"),
            "+model.head.use_transformer_init=True",
            *(f"model.encoder.{size}" for size in SIZES if not size.startswith("ffn")),
            *split("model.tokenizer.tokenizer_model={data}/tokenizer.model model.train_ds.tokens_in_batch=512"),
            "model.tokenizer.special_tokens={bos_token:'<s>',eos_token:'</s>',pad_token:'<pad>'}",
            *(f"model.{part}.file_name={{data}}/text.txt" for part in ("train_ds", "validation_ds", "test_ds")),
        ),
    ),
    Row(
        "upcycle_dense_to_moe",
        shown.experts("out.nemo", of=LLAMA_RUN),
        split("--model {rows}/megatron_ckpt_to_nemo/out --num-experts 4 --output-path {run}/out.nemo"),
        needs=("megatron_ckpt_to_nemo", LLAMA_RUN),
    ),
    Row("tuning/megatron_gpt_finetuning", shown.losses(), (*TUNE, *LORA, ALPHA, BASE)),
    *(
        Row("tuning/megatron_gpt_finetuning", shown.losses(), (*TUNE, f"model.peft.peft_scheme={scheme}", BASE), layout)
        for layout, scheme in SCHEMES.items()
    ),
    Row(
        "tuning/megatron_gpt_generate",
        shown.answers(SAID, PAIRS),
        (*ASK, BASE, GPT_LORA),
        needs=("megatron_gpt_finetuning",),
    ),
    Row("tuning/megatron_gpt_qat", shown.refusal("TensorRT-LLM")),
    Row("tuning/megatron_mamba_finetuning", ANOTHER_MODEL),
    Row("tuning/megatron_mamba_generate", ANOTHER_MODEL),
    Row(
        "tuning/megatron_t5_finetuning",
        shown.losses(),
        (*TUNE, *LORA, T5_TUNED),
        needs=("megatron_t5_seq2seq_finetune",),
    ),
    Row(
        "tuning/megatron_t5_generate",
        shown.answers(SAID, PAIRS),
        (*ASK, T5_TUNED, T5_LORA),
        needs=("megatron_t5_finetuning",),
    ),
    Row(
        "scripts/nlp_language_modeling/merge_lora_weights/merge",
        shown.merged("out.nemo"),
        (
            *CPU,
            "gpt_model_file={data}/llama.nemo",
            GPT_LORA.replace("model.peft.restore_from_path", "lora_model_path"),
            "merged_model_path={run}/out.nemo",
        ),
        needs=("megatron_gpt_finetuning",),
    ),
    Row(
        "scripts/nlp_language_modeling/prepare_packed_ft_dataset",
        shown.packs("out/packed_128_seed0.npy"),
        (
            *split("trainer.precision=32 model.data.train_ds.file_names=[{data}/short.jsonl] +pack_sizes=[128]"),
            *split(
                "model.data.train_ds.max_seq_length=64 +tokenizer_path={data}/tokenizer.model +output_dir={run}/out"
            ),
        ),
    ),
    Row(
        "tuning/megatron_gpt_finetuning",
        shown.losses(),
        (
            *TUNE,
            BASE,
            *split("model.peft.peft_scheme=null ++model.data.train_ds.packed_sequence=True model.micro_batch_size=1"),
            "model.data.train_ds.file_names=[{rows}/prepare_packed_ft_dataset/out/packed_128_seed0.npy]",
            *split("model.data.train_ds.max_seq_length=128 model.data.train_ds.micro_batch_size=1 model.optim.lr=1e-3"),
        ),
        "packed",
        ("prepare_packed_ft_dataset",),
    ),
)
