"""A small Llama in Hugging Face's format, trained by transformers on the demo's corpus: what fine-tuning begins from.

Tool of `make demo-finetune`; a program of its own (`python base_model.py DATA FOLDER STEPS`), which nothing of
nxdt_nemo takes part in. Prints a line `step N loss L` a step. Proof: tests/tools/test_demo_finetune.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

BATCH, LENGTH, RATE = 16, 128, 3e-3


def main(data: Path, folder: Path, steps: int) -> None:
    """Train on `data`/corpus.jsonl and save model and tokenizer in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    from demo_lib.tokens import read_corpus

    torch.manual_seed(1)
    tokenizer = LlamaTokenizer(str(data / "tokenizer.model"), legacy=True, add_bos_token=False)
    ids = [token for text in read_corpus(data / "corpus.jsonl") for token in [*tokenizer(text)["input_ids"], 2]]
    corpus = torch.tensor(ids)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
            initializer_range=0.06,  # of the order of hidden ** -0.5: adapters leave the output layer as it is
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        starts = torch.randint(len(corpus) - LENGTH, (BATCH,))
        batch = torch.stack([corpus[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        print(f"step {step} loss {loss.item():.4f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(data / "tokenizer.model", folder / "tokenizer.model")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
