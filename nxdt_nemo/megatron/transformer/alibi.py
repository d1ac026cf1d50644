"""Attention with linear biases: the slope of each head.

Room megatron/. Stands in for the slopes of NeMo's ALiBiRelativePositionEmbedding
(nemo.collections.nlp.modules.common.megatron.position_embedding), which megatron-core's layers have no place for; the
bias itself is blocked_attention.Rule's. Proof: tests/megatron/test_alibi.py.
Paper: Press et al. 2021, arXiv:2108.12409.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["slopes_of"]


def slopes_of(heads: int, device: torch.device) -> Tensor:
    """What a unit of distance takes from a head's scores: float32 [heads].

    2^(-8 i / n) for i = 1 .. n where n, the heads, is a power of two; else those of the power below, and of the next
    one every other, as the paper's authors have it.
    """
    below = 2 ** int(math.log2(heads))
    between = _powers(2 * below)[::2][: heads - below]
    return torch.tensor(_powers(below) + between, dtype=torch.float32, device=device)


def _powers(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * place / heads) for place in range(1, heads + 1)]
