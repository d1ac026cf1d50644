"""A T5's forward with the padding masks that NeMo hands to it.

Room megatron/. Wraps one method of megatron.core.models.T5.t5_model. Proof: tests/megatron/test_t5_masks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["forward"]


def forward(
    original: Callable[..., Any],
    self: Any,
    encoder_input_ids: torch.Tensor,
    decoder_input_ids: torch.Tensor,
    encoder_attn_mask: torch.Tensor,
    decoder_attn_mask: torch.Tensor | None,
    encoder_decoder_attn_mask: Any,
    *args: Any,
    **named: Any,
) -> Any:
    """Upstream's, with NeMo's masks as TransformerEngine understands them. True is hidden; [B, 1, 1, S] is padding.

    Cross attention's pair of padding masks is made the one [B, 1, S_dec, S_enc] that megatron-core's own attention
    takes. The decoder's own attention is causal where it gets no mask; where it gets one, upstream's softmax is causal
    in bfloat16 and follows the mask alone in float32. So it gets no padding: what stands behind the end of a sequence
    no token of it sees anyway.
    """
    if decoder_attn_mask is not None and decoder_attn_mask.shape[-2] == 1:
        decoder_attn_mask = None
    pair = encoder_decoder_attn_mask
    if isinstance(pair, tuple):
        decoder, encoder = pair
        encoder_decoder_attn_mask = decoder.transpose(-1, -2) | encoder
    return original(
        self,
        encoder_input_ids,
        decoder_input_ids,
        encoder_attn_mask,
        decoder_attn_mask,
        encoder_decoder_attn_mask,
        *args,
        **named,
    )
