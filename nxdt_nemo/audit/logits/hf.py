"""Logits by transformers: `python -m nxdt_nemo.audit.logits.hf FOLDER OUT.pt`.

Room audit/. Imports torch and transformers; nothing of ours but the batch. Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nxdt_nemo.audit.logits import tokens

__all__ = ["main"]


def main(folder: Path, out: Path) -> None:
    """Write float32 logits [BATCH, LENGTH, vocabulary] of the folder's model, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    ids = torch.tensor(tokens(model.config.vocab_size))
    with torch.no_grad():
        torch.save(model(ids).logits.float(), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
