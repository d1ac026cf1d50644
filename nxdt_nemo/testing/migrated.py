"""Upstream configurations of three dialects through `nxdt-nemo run --config`: shrunk by overrides only, 3 steps.

Room testing/. The files are in the public repositories NVIDIA/NeMo (v2.4.0), aws-neuron/neuronx-nemo-megatron and
aws-neuron/neuronx-distributed-training: environment variables name their checkouts. For tools/migrate_train.py and
tests/nemo/test_run_config.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nxdt_nemo.testing.script_run import Run, hugging_face_llama, run, write_rows

__all__ = ["CASES", "CHECKOUTS", "Case", "config_files", "train"]

# dialect: (variable that names the checkout, folders of its YAML files)
LANGUAGE = "examples/nlp/language_modeling"
CHECKOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nemo": ("NXDT_NEMO_CHECKOUT", (f"{LANGUAGE}/conf", f"{LANGUAGE}/tuning/conf")),
    "nxdt": ("NXDT_CHECKOUT", ("examples/conf",)),
    "nnm": ("NNM_CHECKOUT", (f"nemo/{LANGUAGE}/conf", f"nemo/{LANGUAGE}/tuning/conf")),
}


@dataclass(frozen=True)
class Case:
    """One configuration and how it is shrunk beyond what all have in common.

    data     what it trains on: text as .bin and .idx, rows of token ids, pairs of input and output, or preferences
    groups   KV heads; overrides of sizes that only this file has
    ranks    processes that Lightning starts
    options  of `nxdt-nemo run`, "{checkout}" for the folder
    """

    dialect: str
    name: str
    data: Literal["text", "rows", "pairs", "preferences"] = "text"
    groups: int = 4
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


LENGTH = 32
SETUP = ("--train-setup", "{checkout}/nemo/examples/nlp/language_modeling/train_setup.sh")
SPM = ("model.tokenizer.sentencepiece_legacy=False",)  # the test tokenizer's end of text; NeMo's default hides it
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=True")
ALIGNED, PROMPT = "model_alignment_strategy", "max_prompt_length=16"
CP2 = ("model.context_parallel_size=2",)
CASES = (
    Case("nemo", "megatron_gpt_config"),
    Case("nemo", "megatron_llama_config", ranks=2, overrides=TP2),
    Case("nemo", "megatron_qwen2_config", groups=2),
    Case("nemo", "megatron_baichuan2_config"),
    Case("nemo", "megatron_starcoder2_config", groups=2, overrides=("exp_manager.create_wandb_logger=False", *SPM)),
    Case("nxdt", "megatron_gpt_config", ranks=2, overrides=TP2),
    Case("nxdt", "megatron_llama_7B_config"),
    Case("nxdt", "megatron_mistral_config", groups=2, overrides=("model.window_size=[15,0]",)),
    Case("nxdt", "megatron_mixtral_8x7b_config", groups=2, overrides=("model.num_moe_experts=4",)),
    Case("nxdt", "hf_llama3_8B_config", data="rows", groups=2, ranks=2, overrides=TP2),
    Case("nxdt", "hf_llama_7B_config", data="rows"),
    Case("nxdt", "hf_llama3_70B_CP_config", data="rows", groups=2, ranks=2, overrides=CP2),
    Case("nxdt", "hf_mixtral_8x7b_config", data="rows", groups=2, overrides=("model.num_moe_experts=4",)),
    Case("nxdt", "hf_mixtral_8x7b_dropless_config", data="rows", groups=2, overrides=("model.num_moe_experts=4",)),
    Case("nxdt", "hf_llama3_8B_SFT_config", data="pairs", groups=2, overrides=SPM),
    Case("nxdt", "hf_llama3_8B_SFT_lora_config", data="pairs", groups=2, ranks=2, overrides=(*TP2, *SPM)),
    Case("nxdt", "hf_llama3_8B_DPO_config", data="preferences", groups=2, overrides=(f"{ALIGNED}.dpo.{PROMPT}", *SPM)),
    Case(
        "nxdt", "hf_llama3_8B_ORPO_config", data="preferences", groups=2, overrides=(f"{ALIGNED}.orpo.{PROMPT}", *SPM)
    ),
    Case("nnm", "megatron_gpt_config", options=SETUP),
    Case("nnm", "megatron_llama_config", ranks=2, overrides=TP2, options=SETUP),
    Case("nnm", "megatron_llama_70b_config", groups=2),
    Case("nnm", "megatron_mistral_config", groups=2, overrides=("model.window_size=[15,0]",), options=SETUP),
    Case("nnm", "megatron_bigcode_config", groups=1, options=SETUP),
)


def config_files(dialect: str) -> list[Path]:
    """The YAML files of a dialect's checkout; empty when the variable names none."""
    variable, folders = CHECKOUTS[dialect]
    if not os.environ.get(variable):
        return []
    root = Path(os.environ[variable])
    return sorted(file for folder in folders for file in (root / folder).rglob("*.yaml"))


def overrides(case: Case, corpus: Path, folder: Path) -> list[str]:
    """Layers, sizes, sequence, batch, layout, data and where to log: nothing else is changed."""
    return [
        f"trainer.devices={case.ranks}",
        "trainer.num_nodes=1",
        "trainer.max_steps=3",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=3",
        f"trainer.limit_val_batches={0.0 if case.data == 'rows' else 1}",
        "model.tensor_model_parallel_size=1",
        "model.pipeline_model_parallel_size=1",
        "model.context_parallel_size=1",
        "model.sequence_parallel=False",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        f"model.encoder_seq_length={LENGTH}",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.num_attention_heads=4",
        f"model.num_query_groups={case.groups}",
        "model.data.num_workers=0",
        f"exp_manager.explicit_log_dir={folder / 'run'}",
        *_data(case, corpus, folder),
        *case.overrides,
    ]


def _data(case: Case, corpus: Path, folder: Path) -> list[str]:
    if case.data == "rows":
        return [f"data.train_dir={write_rows(corpus, LENGTH)}", "model.tokenizer.vocab_size=1024"]
    tokenizer = [
        "model.tokenizer.library=sentencepiece",
        "model.tokenizer.type=null",
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
    ]
    if case.data == "text":
        return [
            *tokenizer,
            f"model.data.data_prefix=[1.0,{corpus / 'text_document'}]",
            f"model.data.index_mapping_dir={folder / 'index'}",
            "model.data.splits_string='900,50,50'",  # each of the small corpus's splits has a document
        ]
    answers = ("chosen", "rejected") if case.data == "preferences" else ("output",)
    prompt = "prompt" if case.data == "preferences" else "input"
    lines = [{prompt: f"the sum of {n} and {n}"} | {name: f"is {n}, {name}" for name in answers} for n in range(64)]
    (folder / "lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    base = hugging_face_llama(folder / "base", seed=3, length=LENGTH, rope_theta=5e5)
    files = [f"data.{name}={folder / 'lines.jsonl'}" for name in ("train_dir", "val_dir")]
    return [*tokenizer, *files, f"model.restore_from_path={base}"]


def train(case: Case, corpus: Path, folder: Path, environment: Sequence[tuple[str, str]] = ()) -> Run:
    """The run, in a folder of its own."""
    checkout = os.environ[CHECKOUTS[case.dialect][0]]
    file = next(file for file in config_files(case.dialect) if file.stem == case.name)
    options = [option.format(checkout=checkout) for option in case.options]
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--config", str(file), *options, *overrides(case, corpus, folder)]
    return run(
        Path(words[0]),
        words[1:],
        folder / "run",
        cwd=folder,
        seconds=1200,
        environment={"NXDT_NEMO_RUNTIME": "cpu", "HF_HUB_OFFLINE": "1", **dict(environment)},
    )
