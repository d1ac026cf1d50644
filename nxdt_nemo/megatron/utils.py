"""What stands in for parts of megatron.core.utils: a question about TransformerEngine, the buffer of gathered tensors.

Room megatron/. Proof: tests/megatron/test_utils.py, tests/megatron/test_xla_lift.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["get_tensor", "is_te_min_version"]


def is_te_min_version(upstream: Callable[..., bool], version: str, check_equality: bool = True) -> bool:
    """False without TransformerEngine, where upstream compares None with a version."""
    from megatron.core.utils import get_te_version

    return get_te_version() is not None and upstream(version, check_equality)


def get_tensor(
    self: Any, tensor_shape: Sequence[int], dtype: torch.dtype, name: str, mem_alloc_context: Any = None
) -> torch.Tensor:
    """An empty tensor of its own for each gathering. Signature: megatron.core.utils.GlobalMemoryBuffer.get_tensor.

    The buffer that upstream keeps is a value of the traced program: each gathering would be an update of a part of the
    one before it, from step to step, and the compiler knows how to use memory twice.
    """
    import torch

    from nxdt_nemo.runtime import current

    return torch.empty(tuple(tensor_shape), dtype=dtype, device=current().device())
