"""What NeMo's scripts would download or find on NVIDIA's machines, made here: a Hugging Face Llama and its import,
tokenizers, a corpus, questions and answers. Vocabularies have upstream's sizes, and words that mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo2_lib.small_llama import FIXED, write_hugging_face
from nxdt_nemo.testing.script_run import write_corpus

__all__ = ["Inputs", "make"]


@dataclass(frozen=True)
class Inputs:
    """Folders below one, and the environment in which scripts look there."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def answers(self) -> Path:
        return self.folder / "nemo" / "datasets" / "dolly"

    @property
    def environment(self) -> dict[str, str]:
        """NEMO_HOME and the caches; `tests` of the checkout is a package of that name."""
        paths = [str(self.folder / "checkout"), os.environ.get("PYTHONPATH", "")]
        return {
            "NEMO_HOME": str(self.folder / "nemo"),
            "HF_HOME": str(self.folder / "hub"),
            "TORCH_HOME": str(self.folder / "torch"),
            "NEMORUN_HOME": str(self.folder / "nemo_run"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # torchrun
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }


def make(folder: Path, checkout: Path | None) -> Inputs:
    """All of it. `checkout`: of NeMo, for scripts that import from its tests."""
    made = Inputs(folder)
    write_corpus(made.corpus)
    write_hugging_face(folder / "hf")
    write_hugging_face(folder / "hf_fixed", FIXED)
    _write_answers(made.answers)
    shutil.copytree(made.answers, made.answers.with_name("squad"))
    _write_vocabularies(folder)
    _write_numbers(folder / "numbers")
    if checkout is not None:
        (folder / "checkout").mkdir()
        for name in ("tests", "scripts"):
            (folder / "checkout" / name).symlink_to(checkout / name)
    return made


def _write_answers(folder: Path) -> None:
    """training, validation and test.jsonl: twelve words of Python's documentation, and the twelve after them."""
    from pydoc_data.topics import topics

    def pairs() -> Iterator[str]:
        for text in topics.values():
            words = text.split()[:400]
            for at in range(0, len(words) - 24, 24):
                answer = {"input": " ".join(words[at : at + 12]), "output": " ".join(words[at + 12 : at + 24])}
                yield json.dumps(answer) + "\n"

    found = list(pairs())
    folder.mkdir(parents=True)
    for name, part in (("training", found[:400]), ("validation", found[400:440]), ("test", found[440:480])):
        (folder / f"{name}.jsonl").write_text("".join(part))


def _write_vocabularies(folder: Path) -> None:
    """GPT-2's and BERT's, where NeMo and transformers look before they download them."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pairs = [(one, other) for one in letters for other in letters][: 50256 - len(letters)]
    tokens = [*letters, *(one + other for one, other in pairs), "<|endoftext|>"]
    gpt2 = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{one} {other}" for one, other in pairs)]),
    }
    ascii_letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_letters, *(f"##{letter}" for letter in ascii_letters)]
    bert = "\n".join([*words, *(f"word{number}" for number in range(30522 - len(words)))])
    _cache(folder, "gpt2", "GPT2Tokenizer", gpt2)
    for name in ("bert-large-uncased", "bert-large-cased"):
        _cache(folder, name, "BertTokenizer", {"vocab.txt": bert})
    megatron = folder / "torch" / "megatron"
    megatron.mkdir(parents=True)
    for name in ("uncased", "cased"):
        (megatron / f"megatron-bert-345m-{name}_vocab").write_text(bert)
    (megatron / "megatron-gpt-345m_vocab").write_text(gpt2["vocab.json"])
    (megatron / "megatron-gpt-345m_merges").write_text(gpt2["merges.txt"])


def _write_numbers(prefix: Path) -> None:
    """numbers.bin and .idx: 200 documents of 1,000 tokens, so that a hundredth of them is some samples."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = torch.Generator().manual_seed(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(200):
        builder.add_document(torch.randint(1000, (1000,), generator=draw, dtype=torch.int32), [1000])
    builder.finalize(f"{prefix}.idx")


def _cache(folder: Path, name: str, kind: str, files: dict[str, str]) -> None:
    """A tokenizer as huggingface_hub keeps what it has downloaded."""
    root = folder / "hub" / "hub" / f"models--{name}"
    snapshot = root / "snapshots" / "made-here"
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("made-here")
    config = {"config.json": {"model_type": kind.removesuffix("Tokenizer").lower()}}
    config["tokenizer_config.json"] = {"tokenizer_class": kind}
    for file, text in {**files, **{file: json.dumps(value) for file, value in config.items()}}.items():
        (snapshot / file).write_text(text)
