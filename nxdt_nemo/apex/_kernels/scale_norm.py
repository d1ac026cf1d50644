"""Scaling, adding and norms of lists of tensors.

Room apex/. Stands in for the amp_C functions of the same names. Norms are taken in float32 whatever the tensors'
dtype. Proof: tests/apex/test_amp_C.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .lists import TRACED_DEVICES, Tensors, in_float32, store

__all__ = [
    "multi_tensor_axpby",
    "multi_tensor_l2norm",
    "multi_tensor_l2norm_scale",
    "multi_tensor_scale",
    "multi_tensor_unscale_l2norm",
    "norms",
]

Scalar = float | torch.Tensor


def _raise_flag(noop_flag: torch.Tensor, bad: torch.Tensor) -> None:
    """Set the flag (one element, any shape and dtype) to 1 if `bad`; leave it as it is otherwise."""
    noop_flag.copy_(torch.where(bad.reshape(noop_flag.shape), torch.ones_like(noop_flag), noop_flag))


def _raise_flag_if_not_finite(noop_flag: torch.Tensor, tensors: Tensors) -> None:
    """Set the flag to 1 if any element is inf or NaN: both survive a maximum and a minimum."""
    full = [t for t in tensors if t.numel()]
    if full:
        extremes = torch.stack([extreme.float() for t in full for extreme in (t.amax(), t.amin())])
        _raise_flag(noop_flag, extremes.isfinite().all().logical_not())


def _scale_into(sources: Tensors, destinations: Tensors, scale: Any) -> None:
    """destination = source * scale, computed in float32; in place where both are the same tensors."""
    if all(a is b for a, b in zip(sources, destinations, strict=True)):
        torch._foreach_mul_(list(destinations), scale)
    elif isinstance(scale, (int, float)) and scale == 1.0:
        torch._foreach_copy_(list(destinations), list(sources))
    else:
        torch._foreach_copy_(list(destinations), torch._foreach_mul(in_float32(sources), scale))


def multi_tensor_scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Tensors], scale: Scalar
) -> None:
    """[source, destination]: destination = source * scale; the flag is raised if a source is not finite."""
    sources, destinations = tensor_lists
    if sources:
        _raise_flag_if_not_finite(noop_flag, sources)
        _scale_into(sources, destinations, scale)


def multi_tensor_axpby(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    a: float,
    b: float,
    arg_to_check: int = -1,
) -> None:
    """[x, y, out]: out = a*x + b*y; the flag is raised if x (0), y (1) or either (-1) is not finite."""
    xs, ys, outs = tensor_lists
    if not xs:
        return
    _raise_flag_if_not_finite(noop_flag, {0: xs, 1: ys}.get(arg_to_check, [*xs, *ys]))
    sums = torch._foreach_mul(in_float32(xs), a)
    torch._foreach_add_(sums, in_float32(ys), alpha=b)
    store(sums, outs)


# torch's norms add float32 squares one after the other on a CPU (off by 6e-4 at 10M elements, against float64), its sum
# adds pairwise. Norms of short rows, whose squares are then summed, are as exact and five times as fast as a sum alone.
_ROW = 1024


def norms(tensors: Tensors) -> torch.Tensor:
    """The 2-norm of each tensor, float32, shape [len(tensors)]."""
    return torch.stack([_sum_of_squares(t.float()) for t in tensors]).sqrt()


def _sum_of_squares(t: torch.Tensor) -> torch.Tensor:
    if t.device.type in TRACED_DEVICES:
        # XLA:CPU takes 2.5 times as long for one sum over all, which is what it makes of two.
        return (torch.linalg.vector_norm(t, dim=-1) if t.dim() > 1 else t).square().sum()
    flat = t.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rest = flat[whole:].square().sum()
    if not whole:
        return rest
    rows: torch.Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    return rows.square().sum() + rest


def _result(norms: torch.Tensor, per_tensor: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of all [1], norm of each [n] or empty [0]), as Apex returns them."""
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Tensors], per_tensor: bool | None = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[x]: the 2-norm of all elements, float32 [1], and with `per_tensor` of each tensor [n], else empty.

    The flag is raised if the norm is not finite.
    """
    total, each = _result(norms(tensor_lists[0]), per_tensor)
    _raise_flag(noop_flag, total.isfinite().logical_not())
    return total, each


def multi_tensor_unscale_l2norm(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    inv_scale: torch.Tensor,
    per_tensor: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As multi_tensor_l2norm, of x * inv_scale, which is not stored."""
    total, each = _result(norms(tensor_lists[0]) * inv_scale.reshape(()).abs(), per_tensor)
    _raise_flag(noop_flag, total.isfinite().logical_not())
    return total, each


def multi_tensor_l2norm_scale(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    scale: Scalar,
    per_tensor: bool | None = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[x, out]: out = x * scale, and the norms of the scaled values."""
    sources, destinations = tensor_lists
    scaled = torch._foreach_mul(in_float32(sources), scale)
    total, each = _result(norms(scaled), per_tensor)
    torch._foreach_copy_(list(destinations), scaled)
    _raise_flag(noop_flag, total.isfinite().logical_not())
    return total, each
