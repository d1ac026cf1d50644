"""The overrides that make a composition a rehearsal of seconds on two ranks; nothing else is changed."""

from __future__ import annotations

from pathlib import Path

from nxdt_nemo.config.compositions import PREFERENCES, Composition
from nxdt_nemo.config.view import View

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
T5_SIDES = ("encoder", "decoder")


def layout(view: View) -> tuple[int, int]:
    """(tensor, pipeline) parallel sizes of two ranks: a pipeline where the composition has one, else TP, else DP."""
    if view.size("model.pipeline_model_parallel_size") > 1:
        return 1, 2
    return (2, 1) if view.size("model.tensor_model_parallel_size") > 1 else (1, 1)


def overrides(job: Composition, view: View, corpus: Path, folder: Path, base: Path) -> list[str]:
    """Of a composition whose config is `view`: sizes, steps, and the files that it asks for.

    corpus   tokenizer.model, bert/, text_document.{bin,idx}, tuning.jsonl, pairs.jsonl
    folder   where the run logs
    base     the model that tuning begins from
    """
    tp, pp = layout(view)
    return [
        *job.overrides,
        *_sizes(job, view),
        "trainer.devices=2",
        "trainer.num_nodes=1",
        "trainer.max_steps=3",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=3",
        "trainer.limit_val_batches=1",
        "exp_manager.create_checkpoint_callback=false",
        f"exp_manager.explicit_log_dir={folder / 'run'}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        *(["model.sequence_parallel=false"] if tp == 1 and view.has("model.sequence_parallel") else []),
        "model.micro_batch_size=1",
        "model.global_batch_size=4",
        "model.make_vocab_size_divisible_by=64",
        "model.optim.lr=1e-3",
        "model.optim.sched.warmup_steps=1",
        "model.optim.sched.min_lr=1e-4",
        *_tokenizer(job, corpus),
        *_data(job, corpus, base),
    ]


def _sizes(job: Composition, view: View) -> list[str]:
    if job.model == "t5":
        sides = [f"model.{side}.{name}={size}" for side in T5_SIDES for name, size in SIZES.items()]
        return [*sides, "model.seq_length=64", "model.data.seq_length_dec=32", "model.data.whole_word_masking=false"]
    found = [f"model.{name}={size}" for name, size in SIZES.items()] + ["model.encoder_seq_length=64"]
    if view.get("model.num_query_groups") is not None:
        adapters = view.get("model.peft.peft_scheme") is not None
        found.append(f"model.num_query_groups={2 if adapters else 1}")
    if view.get("model.window_size") is not None:
        found.append("model.window_size=[15,0]")
    return found


def _tokenizer(job: Composition, corpus: Path) -> list[str]:
    if job.model == "bert":
        return [
            "model.tokenizer.library=huggingface",
            f"model.tokenizer.type={corpus / 'bert'}",
            "model.tokenizer.vocab_file=null",
        ]
    merges = ["model.tokenizer.merge_file=null"] if job.model.startswith("gpt3") or job.model == "t5" else []
    return [
        "model.tokenizer.library=sentencepiece",
        "model.tokenizer.type=null",
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        "model.tokenizer.vocab_file=null",
        *merges,
    ]


def _data(job: Composition, corpus: Path, base: Path) -> list[str]:
    if job.workflow == "pretrain":
        text = corpus / ("bert_document" if job.model == "bert" else "text_document")
        return [
            f"model.data.data_prefix=[1.0,{text}]",
            "model.data.num_workers=0",
            "model.data.splits_string='80,10,10'",
        ]
    prefers = job.workflow in PREFERENCES
    file = corpus / ("pairs.jsonl" if prefers else "tuning.jsonl")
    files = [f"model.data.{split}.file_names=[{file}]" for split in ("train_ds", "validation_ds")]
    return [*files, f"model.restore_from_path={base}"]
