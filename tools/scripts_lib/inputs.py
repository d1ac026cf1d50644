"""What the scripts read: text for each tokenizer, pairs and prompts, and a small Llama as a .nemo."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from configs_lib import corpus
from omegaconf import OmegaConf

from nxdt_nemo.testing.script_run import hugging_face_llama

__all__ = ["PROMPTS", "prepare", "settings_of"]

PROMPTS = ("The value of the expression", "An object of a class")
LENGTH = 128


def prepare(folder: Path) -> Path:
    """Make them, once; returns `folder`.

    tokenizer.model, text_document.{bin,idx}, bert/, vocab.txt, bert_document.{bin,idx}, tuning.jsonl: configs_lib's
    short.jsonl, short.source.txt, short.target.txt   pairs of a few words, three ways
    few.source.txt, few.target.txt                    the first four of them, over and over
    text.txt, prompts.jsonl                           lines of text; PROMPTS
    encoder.pt, classifier.pt                         a BERT of NeMo before 1.0, with a tensor each
    llama/, llama.nemo                                a Llama with random weights
    megatron_lm/release, hparams.yaml                 the same as Megatron-LM saves it at TP 2, and its settings
    """
    if not (folder / "hparams.yaml").exists():
        corpus.write(folder)
        _pairs(folder)
        _llama(folder)
    return folder


def _pairs(folder: Path) -> None:
    long = [json.loads(line) for line in (folder / "tuning.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [{key: " ".join(text.split()[:6]) for key, text in pair.items()} for pair in long]
    (folder / "short.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    for name, key in (("source", "input"), ("target", "output")):
        lines = [f"{pair[key]}\n" for pair in pairs]
        (folder / f"short.{name}.txt").write_text("".join(lines), encoding="utf-8")
        (folder / f"few.{name}.txt").write_text("".join(lines[:4] * 200), encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(prompt)}\n" for prompt in PROMPTS), encoding="utf-8")
    (folder / "text.txt").write_text("".join(f"{pair['output']}\n" for pair in long), encoding="utf-8")


def _llama(folder: Path) -> None:
    import torch

    torch.save({"bert.encoder.weight": torch.zeros(2, 2)}, folder / "encoder.pt")
    torch.save({"mlp.weight": torch.ones(2)}, folder / "classifier.pt")
    hugging_face_llama(folder / "llama", seed=7, length=LENGTH, num_hidden_layers=4, initializer_range=0.2)
    (folder / "llama" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    _convert(folder, "llama", "llama.nemo", "--to", "nemo")
    _convert(folder, "llama", "megatron_lm", "--to", "torch", "--tp", "2", "--divisible-by", "64")
    settings = settings_of(folder / "llama.nemo")
    settings.tensor_model_parallel_size = 2
    settings.tokenizer.model = str(folder / "tokenizer.model")
    OmegaConf.save({"cfg": settings}, folder / "hparams.yaml")


def settings_of(file: Path) -> Any:
    """model_config.yaml of a .nemo."""
    with tarfile.open(file) as packed:
        return OmegaConf.create(packed.extractfile("./model_config.yaml").read().decode())  # type: ignore[union-attr]


def _convert(folder: Path, source: str, target: str, *options: str) -> None:
    words = ["ckpt", "convert", str(folder / source), str(folder / target), *options]
    subprocess.run([sys.executable, "-m", "nxdt_nemo", *words], check=True)
