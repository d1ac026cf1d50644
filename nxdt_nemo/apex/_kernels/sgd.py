"""One SGD step over lists of tensors.

Room apex/. Stands in for amp_C.multi_tensor_sgd. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .lists import Tensors, in_float32, store, undone_if

__all__ = ["SgdSettings", "multi_tensor_sgd", "sgd_update"]


@dataclass(frozen=True)
class SgdSettings:
    """What one step needs beside the tensors. first_run: the momenta start as the gradients."""

    weight_decay: float
    momentum: float
    dampening: float
    lr: float | torch.Tensor
    nesterov: bool
    first_run: bool
    decay_after_momentum: bool


def sgd_update(grads: Tensors, params: Tensors, momenta: Tensors, s: SgdSettings) -> None:
    """One step, in place on params and momenta; 16-bit tensors are computed in float32 and rounded at the end."""
    g, p, b = (in_float32(tensors) for tensors in (grads, params, momenta))
    if s.weight_decay and not s.decay_after_momentum:
        g = list(torch._foreach_add(g, p, alpha=s.weight_decay))
    if s.momentum:
        if s.first_run:
            torch._foreach_copy_(b, g)
        else:
            torch._foreach_mul_(b, s.momentum)
            torch._foreach_add_(b, g, alpha=1 - s.dampening)
        g = list(torch._foreach_add(g, b, alpha=s.momentum)) if s.nesterov else b
    if s.weight_decay and s.decay_after_momentum:
        g = list(torch._foreach_add(g, p, alpha=s.weight_decay))
    rate = torch.as_tensor(s.lr, dtype=torch.float32, device=p[0].device).reshape(())
    torch._foreach_sub_(p, torch._foreach_mul(g, rate))
    store(p, params)
    store(b, momenta)


def multi_tensor_sgd(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Sequence[Tensors],
    wd: float,
    momentum: float,
    dampening: float,
    lr: float | torch.Tensor,
    nesterov: bool,
    first_run: bool,
    wd_after_momentum: bool,
) -> None:
    """[g, p, momentum] and perhaps [16-bit copy of p]: one step; nothing changes if the flag is up."""
    grads, params, momenta, *copies = tensor_lists
    settings = SgdSettings(wd, momentum, dampening, lr, nesterov, first_run, wd_after_momentum)
    with undone_if(noop_flag, params, momenta, *copies):
        sgd_update(grads, params, momenta, settings)
        for copy in copies:
            torch._foreach_copy_(list(copy), list(params))
