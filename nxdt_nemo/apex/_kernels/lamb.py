"""One LAMB step over lists of tensors.

Room apex/. Stands in for amp_C.multi_tensor_lamb, but leaves the gradients as they are (Apex's kernel overwrites
them). Paper: You et al. 2020, arXiv:1904.00962. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adam import AdamSettings, Scalar
from .lists import Tensors, in_float32, store
from .scale_norm import norms

__all__ = ["multi_tensor_lamb"]


def _ratios(params: Tensors, updates: Tensors) -> list[torch.Tensor]:
    """|p| / |update| for each tensor; 1 where either is zero."""
    sizes = zip(norms(params), norms(updates), strict=True)
    return [torch.where((p != 0) & (u != 0), p / u, torch.ones_like(p)) for p, u in sizes]


def multi_tensor_lamb(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    lr: Scalar,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    mode: int,
    global_grad_norm: torch.Tensor,
    max_grad_norm: float,
    use_nvlamb: bool | None = False,
) -> None:
    """[g, p, m, v]: one step; mode 0 is L2, 1 is decoupled decay. The flag is not read, as in Apex.

    Gradients are first scaled down to a global norm of max_grad_norm. Without use_nvlamb, a group with no weight
    decay takes a plain Adam step.
    """
    s = AdamSettings(lr, beta1, beta2, epsilon, step, mode == 1, bool(bias_correction), weight_decay)
    grads, params, means, squares = tensor_lists
    p, m, v = (in_float32(tensors) for tensors in (params, means, squares))
    shrink = torch.clamp(global_grad_norm.reshape(()) / max_grad_norm, min=1.0)
    g = torch._foreach_div(in_float32(grads), shrink)
    if not s.decoupled and weight_decay:
        torch._foreach_add_(g, p, alpha=weight_decay)
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, g, alpha=1 - beta1 if grad_averaging else 1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    rate, correction1, correction2 = s.of_this_step(p[0])
    denominators = torch._foreach_div(v, correction2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, epsilon)
    updates = torch._foreach_div(m, correction1)
    torch._foreach_div_(updates, denominators)
    if s.decoupled and weight_decay:
        torch._foreach_add_(updates, p, alpha=weight_decay)
    if use_nvlamb or weight_decay:
        torch._foreach_mul_(updates, [rate * ratio for ratio in _ratios(p, updates)])
    else:
        torch._foreach_mul_(updates, rate)
    torch._foreach_sub_(p, updates)
    for computed, stored in ((p, params), (m, means), (v, squares)):
        store(computed, stored)
