"""The caller of amp_C's functions.

Room apex/. Stands in for apex.multi_tensor_apply. Proof: tests/apex/test_amp_C.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["MultiTensorApply", "multi_tensor_applier"]

Result = TypeVar("Result")


class MultiTensorApply:
    """Calls `op(chunk_size, noop_flag, tensor_lists, *args)`; the chunk size means nothing here."""

    available = True
    warned = False

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def check_avail(self) -> None:
        """Apex raises here without its extensions; ours are always there."""

    def __call__(
        self,
        op: Callable[..., Result],
        noop_flag_buffer: torch.Tensor,
        tensor_lists: Sequence[Sequence[torch.Tensor]],
        *args: Any,
    ) -> Result:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)
