"""What megatron.core.transformer.moe.moe_utils takes from TransformerEngine and from CUDA, and Sinkhorn's iteration.

Room megatron/. Its router reads `te_general_gemm`, which its import of TransformerEngine binds; None makes it multiply
by torch.mm in the router's dtype. Its token dispatcher brings sizes to the host from CUDA tensors only. Its sinkhorn
asks after each iteration whether to go on. Proof: tests/megatron/test_layouts.py (Mixtral), tests/megatron/test_moe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nxdt_nemo.runtime import current

__all__ = ["SINKHORN_STEPS", "maybe_move_tensor_to_cpu", "sinkhorn", "sinkhorn_steps", "te_general_gemm"]

SINKHORN_STEPS = 30
"""Iterations on a traced lane; neuronx-distributed's default."""

te_general_gemm = None


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor's values on the host, as a numpy array if asked; anything else as it is. Streams mean nothing here."""
    if not torch.is_tensor(tensor):
        return tensor
    return tensor.cpu().numpy() if as_numpy else tensor.cpu()


def sinkhorn(original: Callable[..., Tensor], cost: Tensor, tol: float = 0.0001) -> Tensor:
    """Upstream's where shapes and loops may depend on values, else sinkhorn_steps."""
    return original(cost, tol) if current().ragged else sinkhorn_steps(cost, tol)


def sinkhorn_steps(cost: Tensor, tol: float = 0.0001, steps: int = SINKHORN_STEPS) -> Tensor:
    """exp(cost) [tokens, experts], rows and columns scaled to equal sums; to the bit upstream's if `steps` suffice.

    A fixed number of iterations, of which those after the column factors moved by less than tol on average change
    nothing. Paper: Clark et al. 2022, arXiv:2202.01169, appendix B.
    """
    cost, eps = torch.exp(cost), 0.00000001
    rows, columns = (torch.ones(size, device=cost.device, dtype=cost.dtype) for size in cost.shape)
    going = torch.ones((), device=cost.device, dtype=torch.bool)
    for _ in range(steps):
        new_rows = (1 / cost.shape[0]) * 1 / (torch.sum(columns * cost, 1) + eps)
        new_columns = (1 / cost.shape[1]) * 1 / (torch.sum(new_rows.unsqueeze(1) * cost, 0) + eps)
        moved = torch.mean(torch.abs(columns - new_columns))
        rows, columns = torch.where(going, new_rows, rows), torch.where(going, new_columns, columns)
        going = going & (moved > tol)
    return columns * cost * rows.unsqueeze(1)
