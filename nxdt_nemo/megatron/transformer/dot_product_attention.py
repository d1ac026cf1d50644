"""Core attention: softmax(Q K^T / sqrt(d)) V without CUDA's fused softmax.

Room megatron/. Subclass of megatron.core.transformer.dot_product_attention.DotProductAttention; enters by
ModuleSpec, no patch. Proof: tests/megatron/test_parity.py.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention as _DotProductAttention

__all__ = ["DotProductAttention"]


class DotProductAttention(_DotProductAttention):
    """Upstream's attention with its softmax in plain torch, whatever `masked_softmax_fusion` says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale_mask_softmax.scaled_masked_softmax_fusion = False
