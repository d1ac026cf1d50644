"""Rotary embedding against complex multiplication in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nxdt_nemo.apex.transformer.functional.fused_rope import (
    fused_apply_rotary_pos_emb,
    fused_apply_rotary_pos_emb_cached,
    fused_apply_rotary_pos_emb_thd,
)
from nxdt_nemo.testing.live_bytes import SavedBytes

CASES = [(8, 2, 3, 16, 16), (5, 1, 2, 12, 8), (1, 2, 1, 4, 4)]  # s, b, heads, features, rotated features
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)]
AssertWithin = Callable[..., None]


def angles(length: int, features: int) -> Tensor:
    """[length, 1, 1, features], both halves alike."""
    half = torch.outer(torch.arange(length).float(), 100.0 ** (-torch.arange(0, features, 2).float() / features))
    return torch.cat((half, half), dim=-1)[:, None, None, :]


def turn64(t: Tensor, freqs: Tensor) -> Tensor:
    """Feature i and i + half as one complex number, turned; the rest unchanged."""
    half = freqs.shape[-1] // 2
    number = torch.complex(t[..., :half], t[..., half : 2 * half])
    number = number * torch.polar(torch.ones_like(freqs[..., :half]), freqs[..., :half])
    return torch.cat((number.real, number.imag, t[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize(("s", "b", "heads", "features", "rotated"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_sbhd(
    s: int,
    b: int,
    heads: int,
    features: int,
    rotated: int,
    dtype: torch.dtype,
    tolerance: float,
    cached: bool,
    transposed: bool,
    assert_within: AssertWithin,
) -> None:
    freqs = angles(s, rotated)
    t = torch.randn(s, b, heads, features).to(dtype).requires_grad_()
    if cached:
        y = fused_apply_rotary_pos_emb_cached(t, freqs.cos(), freqs.sin(), transposed)
    else:
        y = fused_apply_rotary_pos_emb(t, freqs, transposed)
    assert (y.dtype, y.shape) == (dtype, t.shape)
    assert not transposed or y.transpose(0, 1).is_contiguous()
    t64 = t.detach().double().requires_grad_()
    wanted = turn64(t64, freqs.double())
    direction = torch.randn(t.shape).to(dtype)
    y.backward(direction)
    wanted.backward(direction.double())
    assert_within(y, wanted, tolerance, "value")
    assert_within(t.grad, t64.grad, tolerance, "dT")


@pytest.mark.parametrize("lengths", [[4, 1, 7], [12], [1, 1]])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_packed_sequences_are_rotated_as_if_alone(
    lengths: list[int], dtype: torch.dtype, tolerance: float, assert_within: AssertWithin
) -> None:
    freqs = angles(12, 8)
    t = torch.randn(sum(lengths), 3, 10).to(dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    y = fused_apply_rotary_pos_emb_thd(t, cu_seqlens, freqs)
    t64 = t.detach().double().requires_grad_()
    pieces = [turn64(piece, freqs[: len(piece), 0].double()) for piece in t64.split(lengths)]
    wanted = torch.cat(pieces)
    direction = torch.randn(t.shape).to(dtype)
    y.backward(direction)
    wanted.backward(direction.double())
    assert y.dtype == dtype
    assert_within(y, wanted, tolerance, "value")
    assert_within(t.grad, t64.grad, tolerance, "dT")


def test_position_zero_is_not_turned_and_position_one_is() -> None:
    t = torch.randn(2, 1, 1, 4)
    y = fused_apply_rotary_pos_emb(t, angles(2, 4))
    torch.testing.assert_close(y[0], t[0])
    assert not torch.allclose(y[1], t[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [8, 12])
def test_the_gradient_is_to_the_bit_that_of_the_products(dtype: torch.dtype, rotated: int) -> None:
    freqs, t = angles(7, rotated), torch.randn(7, 2, 3, 12).to(dtype).requires_grad_()
    direction = torch.randn(t.shape).to(dtype)
    ours, products = (
        fused_apply_rotary_pos_emb(t, freqs),
        fused_apply_rotary_pos_emb_cached(t, freqs.cos(), freqs.sin()),
    )
    assert torch.equal(ours, products)
    found, wanted = (torch.autograd.grad(y, t, direction)[0] for y in (ours, products))
    assert torch.equal(found, wanted)


def test_the_angles_are_all_that_is_kept() -> None:
    freqs, t = angles(7, 8), torch.randn(7, 2, 3, 8, requires_grad=True)
    with SavedBytes() as saved:
        calls = [fused_apply_rotary_pos_emb(t, freqs) for _ in range(3)]
    assert saved.bytes == freqs.nbytes
    with SavedBytes() as products:
        calls += [fused_apply_rotary_pos_emb_cached(t, freqs.cos(), freqs.sin()) for _ in range(3)]
    assert products.bytes == 3 * 2 * freqs.nbytes and len(calls) == 6
