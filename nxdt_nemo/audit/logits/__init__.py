"""What a checkpoint's model makes of a fixed batch, by upstream's own code: the other half of `ckpt convert --verify`.

Room audit/. Run as modules, in processes of their own, so that a converter loads neither transformers nor Megatron:
    python -m nxdt_nemo.audit.logits.hf FOLDER OUT            transformers, any model that AutoModel knows
    python -m nxdt_nemo.audit.logits.megatron FOLDER OUT ...  stock megatron-core on gloo ranks, without our backend
They read tensors through upstream's loaders, not through ours. Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

__all__ = ["BATCH", "LENGTH", "tokens"]

BATCH, LENGTH = 2, 16


def tokens(vocab: int) -> list[list[int]]:
    """Token ids [BATCH, LENGTH] below `vocab`, the same for every reader."""
    return [[(7919 * (row * LENGTH + at) + 13) % vocab for at in range(LENGTH)] for row in range(BATCH)]
