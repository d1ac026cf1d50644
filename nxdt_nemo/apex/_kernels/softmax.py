"""Scaled and masked softmax with the backward that the extension modules offer.

Room apex/. Computed in float32 and returned in the input's dtype. Proof: tests/apex/test_softmax.py.
"""

from __future__ import annotations

import torch

__all__ = ["backward", "batch_per_block", "causal_mask", "scaled_causal_softmax", "scaled_masked_softmax"]

# Apex's kernel gives masked places this score, not minus infinity.
MASKED_SCORE = -10000.0


def causal_mask(size: int, device: torch.device) -> torch.Tensor:
    """[size, size] bool, True above the diagonal: what a position must not see."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _scaled(inputs: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    factor = scale.to(inputs.device) if isinstance(scale, torch.Tensor) else scale
    return inputs.float() * factor


def scaled_masked_softmax(inputs: torch.Tensor, mask: torch.Tensor | None, scale: float | torch.Tensor) -> torch.Tensor:
    """softmax(inputs * scale) over the last dimension without the places where `mask` is true.

    inputs   [b, h, sq, sk]
    mask     [b or 1, 1, sq, sk] bool or uint8, or None; a row that is masked completely gives zeros
    """
    scores = _scaled(inputs, scale)
    if mask is None:
        return torch.softmax(scores, dim=-1).to(inputs.dtype)
    hidden = mask.to(torch.bool)
    probabilities = torch.softmax(scores.masked_fill(hidden, MASKED_SCORE), dim=-1)
    return probabilities.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0).to(inputs.dtype)


def scaled_causal_softmax(inputs: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """softmax(inputs * scale) of each position over itself and those before it; inputs [..., s, s]."""
    scores = _scaled(inputs, scale).masked_fill(causal_mask(inputs.shape[-1], inputs.device), float("-inf"))
    return torch.softmax(scores, dim=-1).to(inputs.dtype)


def backward(grad: torch.Tensor, probabilities: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """The gradient of the inputs, in the dtype of `grad`. Masked places have probability 0, hence gradient 0."""
    p, g = probabilities.float(), grad.float()
    return (_scaled(p * (g - (p * g).sum(dim=-1, keepdim=True)), scale)).to(grad.dtype)


def batch_per_block(sq: int, sk: int, b: int, heads: int) -> int:
    """Apex's kernels need a multiple of this many rows; ours take any number."""
    return 1
