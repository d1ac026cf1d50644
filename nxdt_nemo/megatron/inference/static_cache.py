"""Keys and values of what was generated so far, in buffers of one shape, at a place that the device knows.

Room megatron/. A StaticInferenceContext of megatron.core.inference.contexts; SelfAttention of this backend asks it in
place of upstream's slices by Python numbers, of which each length is another graph on a traced lane.
Proof: tests/megatron/test_static_cache.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

__all__ = ["StaticCache"]


class StaticCache(StaticInferenceContext):
    """Of B rows and up to L tokens: keys and values [L, B, G, D] a layer.

    First the model reads L tokens at once, of which those after the prompts mean nothing: nobody attends to them before
    they are written anew. After `decode` each call of the model is for one token a row, at `position`.
    """

    def __init__(self, max_batch_size: int, max_sequence_length: int) -> None:
        super().__init__(max_batch_size, max_sequence_length)
        self.position: Tensor | None = None

    def decode(self, position: Tensor) -> None:
        """From now on a call is for the token at `position`, int64 [1], which the caller may change in place."""
        self.position = position
        self.enable_decode_mode()

    def hidden(self) -> Tensor:
        """The attention mask of such a call: bool [1, 1, 1, L], True for what comes after the token."""
        assert self.position is not None
        places = torch.arange(self.max_sequence_length, device=self.position.device)
        return (places > self.position)[None, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rotary: Any) -> tuple[Any, ...]:
        """One token's key and value [1, B, G, D] put in place; returns what
        megatron.core's Attention._adjust_key_value_for_inference does, with all L keys and values.

        rotary  angles [L, 1, 1, D] for queries and for keys, or None
        """
        assert self.position is not None
        keys, values = self.key_value_memory_dict[layer]
        keys.index_copy_(0, self.position, key)
        values.index_copy_(0, self.position, value)
        if rotary is not None:
            of_queries, of_keys = rotary
            rotary = (of_queries.index_select(0, self.position), of_keys)
        return query, keys, values, rotary, AttnMaskType.no_mask, None
