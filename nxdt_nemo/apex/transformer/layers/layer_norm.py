"""Norms that mark their parameters for sequence parallelism.

Room apex/. Stands in for apex.transformer.layers.layer_norm. NeMo all-reduces the gradients of parameters with
`sequence_parallel_enabled` over the tensor-parallel ranks. Proof: tests/apex/test_layer_norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...contrib.layer_norm import FastLayerNorm as ContribFastLayerNorm
from ...normalization import FusedLayerNorm as PlainFusedLayerNorm
from ...normalization import MixedFusedLayerNorm as PlainMixedFusedLayerNorm

__all__ = ["FastLayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm"]


def _mark(module: nn.Module, enabled: bool) -> None:
    """Set the flag on the module and its parameters."""
    owners: list[Any] = [module, *module.parameters(recurse=False)]
    for owner in owners:
        owner.sequence_parallel_enabled = enabled


class FusedLayerNorm(PlainFusedLayerNorm):
    """apex.normalization.FusedLayerNorm with the mark."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        sequence_parallel_enabled: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        _mark(self, sequence_parallel_enabled)


class MixedFusedLayerNorm(PlainMixedFusedLayerNorm):
    """apex.normalization.MixedFusedLayerNorm with the mark."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        sequence_parallel_enabled: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, **kwargs)
        _mark(self, sequence_parallel_enabled)


class FastLayerNorm(ContribFastLayerNorm):
    """apex.contrib.layer_norm.FastLayerNorm with the mark."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        sequence_parallel_enabled: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(hidden_size, eps, memory_efficient)
        _mark(self, sequence_parallel_enabled)
