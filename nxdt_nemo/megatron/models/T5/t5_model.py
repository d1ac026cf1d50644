"""A T5's forward with the pair of masks that NeMo hands to it.

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
    decoder_attn_mask: torch.Tensor,
    encoder_decoder_attn_mask: Any,
    *args: Any,
    **named: Any,
) -> Any:
    """Upstream's, with cross attention's two padding masks [B, 1, 1, S] made the one [B, 1, S_dec, S_enc] that it adds.

    True is padding. TransformerEngine takes the pair; megatron-core's own attention takes one mask.
    """
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
