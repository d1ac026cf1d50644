"""What the shrunk runs read: text as .bin/.idx for each tokenizer, and examples to tune on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

from nxdt_nemo.testing.script_run import write_corpus


def write(folder: Path) -> Path:
    """Python's own documentation, three ways; returns `folder`."""
    write_corpus(folder)
    texts = [text.replace("\n", " ") for text in topics.values()][:40]
    _word_pieces(folder, texts)
    pairs = [{"input": text[:80], "output": text[80:200]} for text in texts if len(text) > 200]
    others = [*pairs[1:], pairs[0]]
    (folder / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": pair["input"], "chosen": pair["output"], "rejected": other["output"]}) + "\n"
            for pair, other in zip(pairs, others, strict=True)
        ),
        encoding="utf-8",
    )
    (folder / "tuning.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    return folder


def _word_pieces(folder: Path, texts: list[str]) -> None:
    """bert/, a BERT tokenizer of whole words and characters, and bert_document.{bin,idx} of sentences."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import BertTokenizer

    words = sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})[:900]
    characters = [mark + letter for mark in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *words]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "bert")
    builder = IndexedDatasetBuilder(str(folder / "bert_document.bin"), dtype=np.int32)
    for text in texts:
        sentences = [tokenizer.encode(part, add_special_tokens=False) for part in text.split(". ")[:40]]
        sentences = [ids[:60] for ids in sentences if ids]
        for ids in sentences:
            builder.add_item(torch.tensor(ids, dtype=torch.int32))
        if sentences:
            builder.end_document()
    builder.finalize(str(folder / "bert_document.idx"))
