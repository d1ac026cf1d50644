"""Core attention: softmax(Q K^T / sqrt(d)) V through torch's scaled_dot_product_attention.

Room megatron/. Subclass of megatron.core.transformer.dot_product_attention.DotProductAttention; enters by
ModuleSpec, no patch. Proof: tests/megatron/test_attention.py, tests/megatron/test_parity.py.
Paper: Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention as _DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

__all__ = ["DotProductAttention"]


class DotProductAttention(_DotProductAttention):
    """Upstream's attention, without its [b, n, s, s] scores where the result is the same without them.

    That is a causal mask that nobody handed in, as many keys as queries, and no dropout. A mask of the caller's is
    upstream's business, which fills with -10000 (a row that is hidden altogether attends to all), and dropout too,
    whose random numbers a resumed run must draw as the first one did. There the softmax is plain torch, whatever
    `masked_softmax_fusion` says.
    """

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        """As upstream, and with what latent attention hands to TransformerEngine's: features of a key and a value."""
        super().__init__(*args, **kwargs)
        self.scale_mask_softmax.scaled_masked_softmax_fusion = False
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """S queries, T keys, B micro-batch, N heads, G query groups (each a rank's own), D features a head.

        query       [S, B, N, D]; key, value [T, B, G, D]; any strides; a value may have another D
        returns     [S, B, N * D], D the value's
        """
        plain = attention_mask is None and attention_bias is None and packed_seq_params is None
        if plain and self._is_causal(query, key):
            return self._causal(query, key, value)
        context: Tensor = super().forward(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
        )
        return context

    def _is_causal(self, query: Tensor, key: Tensor) -> bool:
        # upstream's softmax looks at the type it was built with, not at the one in the call
        mask_type = self.scale_mask_softmax.attn_mask_type
        dropout = self.attention_dropout.p if self.training else 0.0
        return mask_type == AttnMaskType.causal and query.shape[0] == key.shape[0] and dropout == 0.0

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Upstream divides the scores by the layer's number (apply_query_key_layer_scaling) and its softmax
        # multiplies them again.
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).reshape(context.shape[2], context.shape[0], -1)
