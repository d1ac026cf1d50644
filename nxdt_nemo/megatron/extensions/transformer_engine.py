"""The rotary embeddings that megatron-core takes from TransformerEngine, in plain torch.

Room megatron/. Stands in for two names of megatron.core.extensions.transformer_engine that exist with
TransformerEngine only: without them a TransformerConfig with apply_rope_fusion, NeMo's default for Llama and
others, cannot even be made. The setting stays as the user wrote it, and the results are those of megatron-core
without fusion, to the bit. May import torch and nxdt_nemo.apex. Proof: tests/megatron/test_rope.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nxdt_nemo.apex.transformer.functional import fused_rope
from nxdt_nemo.errors import NotOnNeuron

__all__ = ["fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"]


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """Rotate t [s, b, h, d] by the angles freqs [s, 1, 1, d2], d2 <= d.

    interleaved              features 2i and 2i + 1 turn together, not i and i + d2 / 2
    transpose_output_memory  has no effect, as upstream: the result is laid out as t is
    """
    if interleaved:
        return _rotate_pairs(t, freqs.cos(), freqs.sin())
    return fused_rope.fused_apply_rotary_pos_emb(t, freqs)


def fused_apply_rotary_pos_emb_thd(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """Rotate packed sequences t [total, h, d]; each starts at angle 0.

    cu_seqlens [sequences + 1] holds where they begin and end; freqs [max_s, 1, 1, d2].
    Raises NotOnNeuron with cp_size > 1.
    """
    if cp_size > 1:
        raise NotOnNeuron("rotary embeddings of packed sequences with context parallelism are not available on Neuron")
    return fused_rope.fused_apply_rotary_pos_emb_thd(t, cu_seqlens, freqs)


def _rotate_pairs(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
    quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turned * cos.to(t.dtype) + quarter * sin.to(t.dtype), kept), dim=-1)
