"""From text to what Megatron trains on: a SentencePiece model, then `.bin`/`.idx`.

Tool of `make demo`; also a program (`python tokens.py CORPUS FOLDER`), since NeMo's imports print and take
seconds: the demo runs it as a child. The writer is megatron-core's IndexedDatasetBuilder and the tokenizer
NeMo's, as in NeMo's own preprocess_data_for_megatron.py, which its wheel leaves out.
Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["VOCAB_SIZE", "index_corpus", "read_corpus", "train_tokenizer"]

VOCAB_SIZE = 2048  # a multiple of 128 x TP for TP 1 to 16, so that no layout pads it further


def read_corpus(corpus: Path) -> Iterator[str]:
    """The documents of a JSON-lines file."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer(corpus: Path, model: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write a SentencePiece BPE model with Llama's special ids: unk 0, bos 1, eos 2; and pad 3."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in read_corpus(corpus) for line in text.split("\n")),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        max_sentence_length=1 << 16,  # bytes; SentencePiece drops longer lines without a word
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=1,
    )
    model.write_bytes(buffer.getvalue())


def index_corpus(corpus: Path, model: Path, prefix: Path) -> dict[str, int]:
    """Tokenize each document, end it with eos, write `prefix`.bin and .idx; returns documents and tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(model_path=str(model))
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    documents = tokens = 0
    for text in read_corpus(corpus):
        ids = [*tokenizer.text_to_ids(text), tokenizer.eos_id]
        builder.add_item(torch.tensor(ids))
        builder.end_document()
        documents, tokens = documents + 1, tokens + len(ids)
    builder.finalize(get_idx_path(str(prefix)))
    return {"documents": documents, "tokens": tokens}


def main(corpus: Path, folder: Path) -> None:
    """Write tokenizer.model and corpus_text_document.{bin,idx} under `folder`, then tokens.json."""
    train_tokenizer(corpus, folder / "tokenizer.model")
    counts = index_corpus(corpus, folder / "tokenizer.model", folder / "corpus_text_document")
    (folder / "tokens.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
