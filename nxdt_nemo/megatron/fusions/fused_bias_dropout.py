"""residual + dropout(x + bias), with one intermediate fewer.

Room megatron/. Stands in for bias_dropout_add_fused_train of megatron.core.fusions.fused_bias_dropout; enters by
jit_fuser (nxdt_nemo/megatron/jit.py). Proof: tests/megatron/test_fusions.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["bias_dropout_add_fused_train"]


def bias_dropout_add_fused_train(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
    """In x's dtype: x and residual [S, B, H], bias [H] or None. Random numbers are drawn as upstream draws them."""
    x, bias = x_with_bias
    residual = residual.to(x.dtype)
    if bias is not None:
        x = x + bias
    dropped = F.dropout(x, prob) if prob else x
    # The sum is the same in either order; in place only where the tensor is ours and autograd saved nothing of it.
    return residual + dropped if dropped is x_with_bias[0] else dropped.add_(residual)
