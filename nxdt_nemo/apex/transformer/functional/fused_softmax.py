"""Softmax of attention scores with scale and mask.

Room apex/. Stands in for apex.transformer.functional.fused_softmax; NeMo's legacy attention subclasses it.
Proof: tests/apex/test_softmax.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..._kernels.softmax import causal_mask
from ..enums import AttnMaskType

__all__ = ["FusedScaleMaskSoftmax"]


class FusedScaleMaskSoftmax(nn.Module):
    """softmax(mask_func(input * scale, mask)) over the last dimension.

    input_in_fp16, input_in_bf16   dtype of the input, and of the result
    attn_mask_type                 causal makes the mask itself where none is given
    scaled_masked_softmax_fusion   accepted; there is one implementation
    mask_func                      (scores, mask) -> scores
    softmax_in_fp32                compute 16-bit input in float32
    scale                          a factor, or None
    Raises RuntimeError for both dtypes at once and for a scale without softmax_in_fp32, as Apex does.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: AttnMaskType,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor],
        softmax_in_fp32: bool,
        scale: float | None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise RuntimeError("input_in_fp16 and input_in_bf16 exclude each other")
        if scale is not None and not softmax_in_fp32:
            raise RuntimeError("a scale needs softmax_in_fp32=True")
        self.input_in_fp16, self.input_in_bf16 = input_in_fp16, input_in_bf16
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type, self.mask_func = attn_mask_type, mask_func
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.softmax_in_fp32, self.scale = softmax_in_fp32, scale

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """scores [b, heads, sq, sk]; mask [b or 1, 1, sq, sk], true where hidden. Same shape and dtype out."""
        sq, sk = scores.shape[-2:]
        if mask is None and self.attn_mask_type.name == AttnMaskType.causal.name and sq > 1:
            if sq != sk:
                raise ValueError(f"a causal mask for {sq} queries and {sk} keys must be given")
            mask = causal_mask(sq, scores.device)[None, None]
        return self.forward_torch_softmax(scores, mask)

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """False: there is no other kernel than forward_torch_softmax, which NeMo overrides."""
        return False

    def forward_torch_softmax(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        widen = self.input_in_float16 and self.softmax_in_fp32
        if widen:
            scores = scores.float()
        if self.scale is not None:
            scores = scores * self.scale
        if mask is not None:
            scores = self.mask_func(scores, mask)
        probabilities = torch.softmax(scores, dim=-1)
        return probabilities.to(torch.float16 if self.input_in_fp16 else torch.bfloat16) if widen else probabilities
