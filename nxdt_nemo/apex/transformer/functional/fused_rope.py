"""Rotary position embedding, halves rotated (not interleaved).

Room apex/. Stands in for apex.transformer.functional.fused_rope. Arithmetic in the input's dtype, cosine and sine
taken in float32, as megatron-core does without a fused kernel. Proof: tests/apex/test_rope.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._absent import unavailable

__all__ = [
    "fused_apply_rotary_pos_emb",
    "fused_apply_rotary_pos_emb_2d",
    "fused_apply_rotary_pos_emb_cached",
    "fused_apply_rotary_pos_emb_thd",
]

fused_apply_rotary_pos_emb_2d = unavailable("apex.transformer.functional.fused_rope.fused_apply_rotary_pos_emb_2d")


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first cos.shape[-1] features of t; the rest pass through."""
    turned, kept = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos.to(t.dtype) + torch.cat((-right, left), dim=-1) * sin.to(t.dtype)
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def fused_apply_rotary_pos_emb_cached(
    t: Tensor, cos_: Tensor, sin_: Tensor, transpose_output_memory: bool = False
) -> Tensor:
    """Rotate t [s, b, h, d] by the angles whose cosine and sine are given, [s, 1, 1, d2] with d2 <= d.

    transpose_output_memory lays the result out so that `.transpose(0, 1)` is contiguous.
    """
    rotated = _rotate(t, cos_, sin_)
    return rotated.transpose(0, 1).contiguous().transpose(0, 1) if transpose_output_memory else rotated


def fused_apply_rotary_pos_emb(t: Tensor, freqs: Tensor, transpose_output_memory: bool = False) -> Tensor:
    """Rotate t [s, b, h, d] by the angles freqs [s, 1, 1, d2], d2 <= d; the angles get no gradient."""
    rotated: Tensor = _Rotation.apply(t, freqs)  # type: ignore[no-untyped-call]
    return rotated.transpose(0, 1).contiguous().transpose(0, 1) if transpose_output_memory else rotated


class _Rotation(torch.autograd.Function):
    """Keeps the angles, which are one tensor for all layers: products would keep a cosine and a sine of each call's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, freqs: Tensor) -> Tensor:
        ctx.save_for_backward(freqs)
        return _rotate(t, freqs.cos(), freqs.sin())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [freqs] = ctx.saved_tensors
        turned, kept = grad[..., : freqs.shape[-1]], grad[..., freqs.shape[-1] :]
        left, right = (turned * freqs.sin().to(grad.dtype)).chunk(2, dim=-1)
        turned = turned * freqs.cos().to(grad.dtype) + torch.cat((right, -left), dim=-1)
        return (torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned), None


def fused_apply_rotary_pos_emb_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor) -> Tensor:
    """Rotate packed sequences t [total, h, d]; each starts at angle 0.

    cu_seqlens [sequences + 1] holds where they begin and end; freqs [max_s, 1, 1, d2].
    """
    token = torch.arange(t.shape[0], device=t.device)
    sequence = (token[:, None] >= cu_seqlens[None, 1:]).sum(dim=1)
    angles = freqs.reshape(freqs.shape[0], 1, -1).index_select(0, token - cu_seqlens.index_select(0, sequence))
    return _rotate(t, angles.cos(), angles.sin())
