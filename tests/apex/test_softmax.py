"""Softmax with scale and mask against torch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from nxdt_nemo.apex import (
    scaled_masked_softmax_cuda,
    scaled_softmax_cuda,
    scaled_upper_triang_masked_softmax_cuda,
)
from nxdt_nemo.apex._kernels.softmax import causal_mask
from nxdt_nemo.apex.transformer.enums import AttnMaskType
from nxdt_nemo.apex.transformer.functional.fused_softmax import FusedScaleMaskSoftmax

SHAPES = [(2, 4, 8, 8), (1, 1, 5, 5), (3, 2, 16, 16)]  # b, heads, sq, sk
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
AssertWithin = Callable[..., None]


def hide(scores: Tensor, mask: Tensor) -> Tensor:
    """NeMo's attention_mask_func."""
    return scores.masked_fill(mask, -10000.0)


def padding(shape: tuple[int, ...]) -> Tensor:
    """[b, 1, sq, sk]: the last keys of each sample are hidden, more of them in later samples."""
    b, _, sq, sk = shape
    keep = sk - 1 - torch.arange(b)
    return (torch.arange(sk) >= keep[:, None])[:, None, None, :].expand(b, 1, sq, sk)


def reference(x: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax and its argument, in float64."""
    x64 = x.detach().double().requires_grad_()
    scores = x64 * scale
    return torch.softmax(scores if mask is None else scores.masked_fill(mask, float("-inf")), dim=-1), x64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(
    ("kind", "given"), [("causal", True), ("causal", False), ("padding", True), ("padding", False)]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_module(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    kind: str,
    given: bool,
    scale: float | None,
    assert_within: AssertWithin,
) -> None:
    hidden = causal_mask(shape[-1], torch.device("cpu"))[None, None] if kind == "causal" else padding(shape)
    module = FusedScaleMaskSoftmax(False, dtype is torch.bfloat16, AttnMaskType[kind], True, hide, True, scale)
    x = (torch.randn(shape) * 4).to(dtype).requires_grad_()
    y = module(x, hidden if given else None)
    assert y.dtype == dtype
    wanted, x64 = reference(x, hidden if given or kind == "causal" else None, scale or 1.0)
    direction = torch.randn(shape).to(dtype)
    y.backward(direction)
    wanted.backward(direction.double())
    assert_within(y, wanted, tolerance, "value")
    assert_within(x.grad, x64.grad, tolerance * 4, "dX")


def test_causal_hides_the_future_and_padding_does_not() -> None:
    x = torch.zeros(1, 1, 4, 4)
    causal = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, False, hide, True, None)(x, None)
    assert causal[0, 0].triu(1).abs().sum() == 0
    torch.testing.assert_close(causal[0, 0, 3], torch.full((4,), 0.25))
    padded = FusedScaleMaskSoftmax(False, False, AttnMaskType.padding, False, hide, True, None)(x, None)
    torch.testing.assert_close(padded, torch.full_like(x, 0.25))


def test_one_query_sees_all_keys_and_other_sizes_need_a_mask() -> None:
    module = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, True, hide, True, None)
    torch.testing.assert_close(module(torch.zeros(1, 1, 1, 4), None), torch.full((1, 1, 1, 4), 0.25))
    with pytest.raises(ValueError, match="2 queries and 4 keys"):
        module(torch.zeros(1, 1, 2, 4), None)
    mask = torch.tensor([[False, False, False, True]] * 2)[None, None]
    assert module(torch.zeros(1, 1, 2, 4), mask)[..., -1].sum() == 0


def test_nemo_overrides_the_softmax_alone() -> None:
    class Matched(FusedScaleMaskSoftmax):
        def forward_torch_softmax(self, scores: Tensor, mask: Tensor | None) -> Tensor:
            assert mask is not None
            return torch.softmax(self.mask_func(scores, mask), dim=-1) * (1.0 - mask.all(dim=-1).float())[:, :, :, None]

    module = Matched(False, False, AttnMaskType.causal, True, hide, True, 1.0)
    x = torch.randn(2, 3, 6, 6)
    assert not module.is_kernel_available(None, 2, 3, 6, 6)
    torch.testing.assert_close(module(x, None), reference(x, causal_mask(6, x.device), 1.0)[0].float())


def test_module_refuses() -> None:
    with pytest.raises(RuntimeError, match="input_in_fp16 and input_in_bf16"):
        FusedScaleMaskSoftmax(True, True, AttnMaskType.causal, True, hide, True, None)
    with pytest.raises(RuntimeError, match="softmax_in_fp32"):
        FusedScaleMaskSoftmax(False, True, AttnMaskType.causal, True, hide, False, 0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("kind", ["plain", "masked", "causal"])
def test_extensions_as_megatron_calls_them(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, kind: str, assert_within: AssertWithin
) -> None:
    x, scale = torch.randn(shape).to(dtype), torch.tensor([0.7])[0]
    mask, module = None, cast(Any, None)
    if kind == "plain":
        module, y = scaled_softmax_cuda, scaled_softmax_cuda.forward(x, scale)
    elif kind == "masked":
        mask = padding(shape)
        module, y = scaled_masked_softmax_cuda, scaled_masked_softmax_cuda.forward(x, mask.to(torch.uint8), scale)
    else:
        mask = causal_mask(shape[-1], x.device)
        flat = x.view(-1, *shape[-2:])
        module = scaled_upper_triang_masked_softmax_cuda
        y = scaled_upper_triang_masked_softmax_cuda.forward(flat, scale).view(shape)
    wanted, x64 = reference(x, mask, 0.7)
    direction = torch.randn(shape).to(dtype)
    wanted.backward(direction.double())
    assert y.dtype == dtype
    assert_within(y, wanted, tolerance, "value")
    gradient = module.backward(direction, y, scale)
    assert gradient.dtype == dtype
    assert_within(gradient, x64.grad, tolerance * 8, "dX")


def test_a_row_without_any_key_is_zero() -> None:
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[..., 1, :] = True
    y = scaled_masked_softmax_cuda.forward(torch.randn(1, 2, 2, 3), mask, 1.0)
    assert not y[:, :, 1].any()
    torch.testing.assert_close(y[:, :, 0].sum(-1), torch.ones(1, 2))
    assert scaled_masked_softmax_cuda.get_batch_per_block(8, 8, 1, 1) == 1
