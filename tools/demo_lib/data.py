"""What a demo trains on: corpus, tokenizer and index in one folder, made once for each Python.

Tool of `make demo` and `make demo-finetune`. Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

from .corpus import write_corpus
from .runs import run_child
from .stages import Stages
from .tokens import VOCAB_SIZE

__all__ = ["prepare_data"]


def prepare_data(data: Path, stages: Stages) -> dict[str, int]:
    """Corpus, tokenizer and index, unless this Python's are already there; returns the counts."""
    data.mkdir(parents=True, exist_ok=True)
    corpus, finished = data / "corpus.jsonl", data / f"python-{platform.python_version()}.json"
    if finished.exists():
        counts: dict[str, int] = json.loads(finished.read_text())
        stages.begin("corpus, tokenizer, index", 1)
        stages.end(f"reused: {counts['documents']} documents, {counts['tokens']} tokens")
        return counts
    stages.begin("corpus: Python's own documentation")
    text = write_corpus(corpus)
    stages.end(f"{text['documents']} documents, {int(text['bytes']) / 1e6:.2f} MB")
    stages.begin("tokenizer and .bin/.idx")
    tool = Path(__file__).with_name("tokens.py")
    run_child("tokenizing", [sys.executable, tool, corpus, data], data / "tokens.log")
    counts = json.loads((data / "tokens.json").read_text()) | {"bytes": int(text["bytes"])}
    stages.end(f"{VOCAB_SIZE} pieces, {counts['tokens']} tokens")
    finished.write_text(json.dumps(counts))  # last: an interrupted preparation is not taken for a whole one
    return counts
