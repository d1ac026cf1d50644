"""Norms against the formula in float64: value, gradients of input, weight and bias."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nxdt_nemo.apex.contrib.layer_norm.layer_norm import FastLayerNorm as ContribFastLayerNorm
from nxdt_nemo.apex.contrib.layer_norm.layer_norm import FastLayerNormFN, _fast_layer_norm
from nxdt_nemo.apex.normalization import FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm
from nxdt_nemo.apex.normalization.fused_layer_norm import (
    FusedLayerNormAffineFunction,
    FusedRMSNormAffineFunction,
    fused_layer_norm,
    fused_rms_norm,
)
from nxdt_nemo.apex.transformer import layers as marked

SHAPES = [((5, 3, 16), 1), ((2, 4, 6), 2), ((7, 1000), 1)]  # input, how many dimensions are normalized
TOLERANCES = [  # dtype, value, gradients: rounding of inputs is shared, rounding of the result is not
    (torch.float32, 1e-6, 5e-6),
    (torch.bfloat16, 8e-3, 1.6e-2),
]
AssertWithin = Callable[..., None]


def norm64(x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float, centered: bool) -> Tensor:
    """The definition, in float64."""
    axes = tuple(range(-dims, 0))
    x = x - x.mean(axes, keepdim=True) if centered else x
    y = x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def check(
    module: nn.Module,
    x: Tensor,
    dims: int,
    eps: float,
    centered: bool,
    out: torch.dtype,
    tol: tuple[float, float],
    assert_within: AssertWithin,
    gamma_offset: float = 0.0,
) -> None:
    """Forward and backward of the module against norm64 on the same rounded inputs."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.5)
    params = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    x = x.detach().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y = module(x)
    assert y.dtype == out
    weight = params["weight"] + gamma_offset if "weight" in params else None
    y64 = norm64(x64, weight, params.get("bias"), dims, eps, centered)
    direction = torch.randn(y.shape).to(out)
    y.backward(direction)
    y64.backward(direction.double())
    assert x.grad is not None
    assert x64.grad is not None
    assert_within(y, y64, tol[0], "value")
    assert_within(x.grad, x64.grad, tol[1], "dX")
    for name, parameter in module.named_parameters():
        assert_within(parameter.grad, params[name].grad, tol[1], f"d{name}")


@pytest.mark.parametrize(("shape", "dims"), SHAPES)
@pytest.mark.parametrize(("dtype", "value", "grads"), TOLERANCES)
@pytest.mark.parametrize("cls", [FusedLayerNorm, MixedFusedLayerNorm, FusedRMSNorm, MixedFusedRMSNorm])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_same_dtype(
    cls: type[nn.Module],
    shape: tuple[int, ...],
    dims: int,
    dtype: torch.dtype,
    value: float,
    grads: float,
    memory_efficient: bool,
    assert_within: AssertWithin,
) -> None:
    module = cls(shape[-dims:], eps=1e-5, memory_efficient=memory_efficient).to(dtype)
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    check(module, x, dims, 1e-5, "Layer" in cls.__name__, dtype, (value, grads), assert_within)


@pytest.mark.parametrize(
    ("cls", "out"),
    [  # bf16 input, float32 weight
        (FusedLayerNorm, torch.bfloat16),
        (FusedRMSNorm, torch.bfloat16),
        (ContribFastLayerNorm, torch.bfloat16),
        (MixedFusedLayerNorm, torch.float32),
        (MixedFusedRMSNorm, torch.float32),
    ],
)
def test_float32_weight_on_bf16_input(cls: type[nn.Module], out: torch.dtype, assert_within: AssertWithin) -> None:
    module = cls(64, 1e-5)
    x = torch.randn(6, 64).bfloat16()
    tolerance = (8e-3, 1.6e-2) if out is torch.bfloat16 else (1e-6, 8e-3)  # dX is bf16 in both
    check(module, x, 1, 1e-5, "RMS" not in cls.__name__, out, tolerance, assert_within)


@pytest.mark.parametrize(("cls", "centered"), [(FusedLayerNorm, True), (FusedRMSNorm, False)])
@pytest.mark.parametrize(("dtype", "value", "grads"), TOLERANCES)
def test_without_weight(
    cls: type[nn.Module], centered: bool, dtype: torch.dtype, value: float, grads: float, assert_within: AssertWithin
) -> None:
    module = cls(32, elementwise_affine=False)
    assert list(module.parameters()) == []
    assert module.weight is None
    check(module, torch.randn(4, 32).to(dtype), 1, 1e-5, centered, dtype, (value, grads), assert_within)
    x = torch.randn(4, 32)
    plain = fused_layer_norm(x, (32,), 1e-3) if centered else fused_rms_norm(x, (32,), 1e-3)
    assert_within(plain, norm64(x.double(), None, None, 1, 1e-3, centered), 1e-6)


@pytest.mark.parametrize(("dtype", "value", "grads"), TOLERANCES)
@pytest.mark.parametrize("cls", [ContribFastLayerNorm, marked.FastLayerNorm])
def test_fast_layer_norm(
    cls: type[nn.Module], dtype: torch.dtype, value: float, grads: float, assert_within: AssertWithin
) -> None:
    x = torch.randn(3, 2, 48).to(dtype)
    check(cls(48, 1e-5).to(dtype), x, 1, 1e-5, True, dtype, (value, grads), assert_within)


def test_layer_norm_1p_as_nemo_derives_it(assert_within: AssertWithin) -> None:
    class LayerNorm1P(marked.FastLayerNorm):
        def reset_parameters(self) -> None:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

        def forward(self, x: Tensor) -> Tensor:
            return _fast_layer_norm(x, self.weight + 1, self.bias, self.epsilon, memory_efficient=False)

    module = LayerNorm1P(24, 1e-5, sequence_parallel_enabled=True)
    assert not any(p.any() for p in module.parameters())
    assert isinstance(module, ContribFastLayerNorm)
    check(module, torch.randn(5, 24), 1, 1e-5, True, torch.float32, (1e-6, 5e-6), assert_within, gamma_offset=1.0)


def test_functions_as_megatron_calls_them(assert_within: AssertWithin) -> None:
    for function in (FusedLayerNormAffineFunction, FastLayerNormFN, FusedRMSNormAffineFunction):
        assert "memory_efficient" in inspect.getfullargspec(function.forward).args
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    wanted = norm64(x.double(), weight.double(), bias.double(), 1, 1e-5, True)
    shape = torch.Size((8,))
    assert_within(FusedLayerNormAffineFunction.apply(x, weight, bias, shape, 1e-5, True), wanted, 1e-6)
    assert_within(FusedLayerNormAffineFunction.apply(x, weight, bias, shape, 1e-5), wanted, 1e-6)
    assert_within(FastLayerNormFN.apply(x, weight, bias, 1e-5, False), wanted, 1e-6)
    assert FastLayerNormFN.apply(x, weight, bias, 1e-5)._base is None
    wanted = norm64(x.double(), weight.double(), None, 1, 1e-5, False)
    assert_within(FusedRMSNormAffineFunction.apply(x, weight, shape, 1e-5, False), wanted, 1e-6)


def test_initial_values_and_names() -> None:
    for module in (FusedLayerNorm(4), marked.FastLayerNorm(4), MixedFusedLayerNorm(4)):
        assert torch.equal(module.state_dict()["weight"], torch.ones(4))
        assert torch.equal(module.state_dict()["bias"], torch.zeros(4))
    assert list(MixedFusedRMSNorm(4).state_dict()) == ["weight"]
    norm = FusedLayerNorm((2, 4), eps=1e-3)
    assert (norm.normalized_shape, norm.eps, norm.elementwise_affine) == (torch.Size((2, 4)), 1e-3, True)
    assert ContribFastLayerNorm(4, 1e-3).epsilon == 1e-3
    assert issubclass(MixedFusedLayerNorm, FusedLayerNorm)
    assert issubclass(MixedFusedRMSNorm, FusedRMSNorm)


@pytest.mark.parametrize("cls", [marked.FusedLayerNorm, marked.MixedFusedLayerNorm, marked.FastLayerNorm])
@pytest.mark.parametrize("enabled", [True, False])
def test_sequence_parallel_mark(cls: Callable[..., nn.Module], enabled: bool) -> None:
    module = cls(8, 1e-5, sequence_parallel_enabled=enabled)
    marks = [vars(owner)["sequence_parallel_enabled"] for owner in (module, *module.parameters())]
    assert marks == [enabled] * 3
    assert not hasattr(FusedLayerNorm(8).weight, "sequence_parallel_enabled")


def test_mixed_norms_take_any_keyword_but_need_a_weight() -> None:
    assert MixedFusedLayerNorm(8, 1e-5, sequence_parallel_enbaled=False).elementwise_affine  # NeMo's spelling
    with pytest.warns(UserWarning, match="elementwise_affine"), pytest.raises(RuntimeError, match="MixedFusedRMSNorm"):
        MixedFusedRMSNorm(8, elementwise_affine=False)
    with pytest.warns(UserWarning, match="elementwise_affine"):
        assert MixedFusedLayerNorm(8, elementwise_affine=True).elementwise_affine
