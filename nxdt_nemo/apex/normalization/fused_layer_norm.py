"""LayerNorm and RMSNorm over the last dimensions.

Room apex/. Stands in for apex.normalization.fused_layer_norm. Statistics are float32 for 16-bit input. The plain
classes return the input's dtype, the Mixed ones the weight's. `memory_efficient` (Apex then saves the output
instead of the input) is accepted and changes no value. Proof: tests/apex/test_layer_norm.py.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._autocast_utils import _cast_if_autocast_enabled, without_autocast

__all__ = [
    "FusedLayerNorm",
    "FusedLayerNormAffineFunction",
    "FusedRMSNorm",
    "FusedRMSNormAffineFunction",
    "MixedFusedLayerNorm",
    "MixedFusedRMSNorm",
    "fused_layer_norm",
    "fused_layer_norm_affine",
    "fused_rms_norm",
    "fused_rms_norm_affine",
    "mixed_dtype_fused_layer_norm_affine",
    "mixed_dtype_fused_rms_norm_affine",
]

Shape = Sequence[int]


def _as_size(shape: int | Shape) -> torch.Size:
    return torch.Size((shape,) if isinstance(shape, numbers.Integral) else shape)  # type: ignore[arg-type]


def layer_norm(x: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm in x's dtype; float32 arithmetic where the weights have another dtype. Autocast has no say."""
    with without_autocast(x):
        if all(t is None or t.dtype == x.dtype for t in (weight, bias)):
            return functional.layer_norm(x, shape, weight, bias, eps)
        w, b = (None if t is None else t.float() for t in (weight, bias))
        return functional.layer_norm(x.float(), shape, w, b, eps).to(x.dtype)


def rms_norm(x: Tensor, shape: Shape, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in x's dtype; float32 arithmetic as in layer_norm."""
    with without_autocast(x):
        if weight is None or weight.dtype == x.dtype:
            return functional.rms_norm(x, list(shape), weight, eps)
        return functional.rms_norm(x.float(), list(shape), weight.float(), eps).to(x.dtype)


class FusedLayerNormAffineFunction:
    """`apply(...)` as on Apex's autograd function; torch's own ops carry the backward.

    megatron-core looks for `memory_efficient` among the arguments of `forward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: Shape,
        eps: float,
        memory_efficient: bool = False,
    ) -> Tensor:
        return layer_norm(x, normalized_shape, weight, bias, eps)

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        return cls.forward(None, *args)


class FusedRMSNormAffineFunction:
    """As FusedLayerNormAffineFunction, without mean and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, normalized_shape: Shape, eps: float, memory_efficient: bool = False
    ) -> Tensor:
        return rms_norm(x, normalized_shape, weight, eps)

    @classmethod
    def apply(cls, *args: Any) -> Tensor:
        return cls.forward(None, *args)


def fused_layer_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """LayerNorm with weight and bias; under autocast everything is cast to autocast's dtype first."""
    x, w, b = _cast_if_autocast_enabled(x, weight, bias)
    return layer_norm(x, normalized_shape, w, b, eps)


def fused_layer_norm(x: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
    """LayerNorm without weight and bias."""
    (x,) = _cast_if_autocast_enabled(x)
    return layer_norm(x, normalized_shape, None, None, eps)


def mixed_dtype_fused_layer_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """LayerNorm that returns the weight's dtype."""
    x, w, b = _cast_if_autocast_enabled(x, weight, bias)
    if x.dtype == w.dtype:
        return layer_norm(x, normalized_shape, w, b, eps)
    return layer_norm(x.float(), normalized_shape, w, b, eps).to(w.dtype)


def fused_rms_norm_affine(
    x: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMSNorm with weight; under autocast everything is cast to autocast's dtype first."""
    x, w = _cast_if_autocast_enabled(x, weight)
    return rms_norm(x, normalized_shape, w, eps)


def fused_rms_norm(x: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
    """RMSNorm without weight."""
    (x,) = _cast_if_autocast_enabled(x)
    return rms_norm(x, normalized_shape, None, eps)


def mixed_dtype_fused_rms_norm_affine(
    x: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMSNorm that returns the weight's dtype."""
    x, w = _cast_if_autocast_enabled(x, weight)
    if x.dtype == w.dtype:
        return rms_norm(x, normalized_shape, w, eps)
    return rms_norm(x.float(), normalized_shape, w, eps).to(w.dtype)


class _Norm(nn.Module):
    """What the four norms share.

    normalized_shape  the last dimensions of the input, an int for one
    """

    has_bias = True
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = _as_size(normalized_shape)
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        for name in ("weight", "bias") if self.has_bias else ("weight",):
            value = nn.Parameter(torch.empty(*self.normalized_shape)) if elementwise_affine else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.has_bias and self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.normalized_shape)}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias, in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return fused_layer_norm(x, self.normalized_shape, self.eps, self.memory_efficient)
        args = (x, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_layer_norm_affine(*args)


class FusedRMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""

    has_bias = False

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return fused_rms_norm(x, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_rms_norm_affine(x, self.weight, self.normalized_shape, self.eps, self.memory_efficient)


def _always_affine(owner: str, kwargs: dict[str, Any]) -> None:
    """The Mixed norms take any keyword, as Apex's do (NeMo misspells one), but cannot be without a weight."""
    if "elementwise_affine" in kwargs:
        warnings.warn(f"{owner} does not support the elementwise_affine argument", stacklevel=3)
        if not kwargs["elementwise_affine"]:
            raise RuntimeError(f"{owner} does not support elementwise_affine=False")


class MixedFusedLayerNorm(FusedLayerNorm):
    """FusedLayerNorm that returns the weight's dtype."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, normalized_shape: int | Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: Any
    ) -> None:
        _always_affine("MixedFusedLayerNorm", kwargs)
        super().__init__(normalized_shape, eps, memory_efficient=memory_efficient)

    def forward(self, x: Tensor) -> Tensor:
        args = (x, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient)
        return mixed_dtype_fused_layer_norm_affine(*args)


class MixedFusedRMSNorm(FusedRMSNorm):
    """FusedRMSNorm that returns the weight's dtype."""

    weight: nn.Parameter

    def __init__(
        self, normalized_shape: int | Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: Any
    ) -> None:
        _always_affine("MixedFusedRMSNorm", kwargs)
        super().__init__(normalized_shape, eps, memory_efficient=memory_efficient)

    def forward(self, x: Tensor) -> Tensor:
        args = (x, self.weight, self.normalized_shape, self.eps, self.memory_efficient)
        return mixed_dtype_fused_rms_norm_affine(*args)
