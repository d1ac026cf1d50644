"""What megatron.core.transformer.moe.moe_utils takes from TransformerEngine and from CUDA.

Room megatron/. Its router reads `te_general_gemm`, which its import of TransformerEngine binds; None makes it multiply
by torch.mm in the router's dtype. Its token dispatcher brings sizes to the host from CUDA tensors only.
Proof: tests/megatron/test_layouts.py (Mixtral).
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["maybe_move_tensor_to_cpu", "te_general_gemm"]

te_general_gemm = None


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor's values on the host, as a numpy array if asked; anything else as it is. Streams mean nothing here."""
    if not torch.is_tensor(tensor):
        return tensor
    return tensor.cpu().numpy() if as_numpy else tensor.cpu()
