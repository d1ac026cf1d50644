"""LayerNorm over the last dimension, any size of it.

Room apex/. Stands in for apex.contrib.layer_norm.layer_norm, whose kernel knows a list of hidden sizes only.
Proof: tests/apex/test_layer_norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._autocast_utils import _cast_if_autocast_enabled
from ...normalization.fused_layer_norm import layer_norm

__all__ = ["FastLayerNorm", "FastLayerNormFN", "_fast_layer_norm"]


class FastLayerNormFN:
    """`apply(x, gamma, beta, epsilon[, memory_efficient])`; torch's own ops carry the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, memory_efficient: bool = False
    ) -> Tensor:
        return layer_norm(x, gamma.shape, gamma, beta, epsilon)

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        return cls.forward(None, *args)


def _fast_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, memory_efficient: bool = False) -> Tensor:
    """LayerNorm in x's dtype; under autocast everything is cast to autocast's dtype first."""
    x, weight, bias = _cast_if_autocast_enabled(x, weight, bias)
    return FastLayerNormFN.apply(x, weight, bias, epsilon, memory_efficient)


class FastLayerNorm(nn.Module):
    """LayerNorm with weight and bias; `memory_efficient` is accepted and changes no value."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, memory_efficient: bool = False) -> None:
        super().__init__()
        self.epsilon, self.memory_efficient = eps, memory_efficient
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero; NeMo's LayerNorm1P overrides it."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _fast_layer_norm(x, self.weight, self.bias, self.epsilon, self.memory_efficient)
