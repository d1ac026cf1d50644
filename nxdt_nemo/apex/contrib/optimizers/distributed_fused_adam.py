"""What nemo.core.optim.distributed_adam needs to be imported: a base class that refuses to be built.

Room apex/. Stands in for apex.contrib.optimizers.distributed_fused_adam. Proof: tests/apex/test_absent.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..._absent import refuse, unavailable

__all__ = ["DistributedFusedAdam", "_disable_pre_forward_hook", "_multi_tensor_copy"]

_HERE = "apex.contrib.optimizers.distributed_fused_adam.DistributedFusedAdam"


class DistributedFusedAdam(torch.optim.Optimizer):
    """A base to be recognized by: NeMo's subclass is ours, and shards by itself (nemo/core/optim/distributed_adam.py).

    The nested names stand in annotations of upstream's subclass.
    """

    ParameterFragment = unavailable(f"{_HERE}.ParameterFragment")
    ParameterBucket = unavailable(f"{_HERE}.ParameterBucket")
    StateBucket = unavailable(f"{_HERE}.StateBucket")

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        refuse(_HERE, "use NeMo's optim.name: distributed_fused_adam")


@contextmanager
def _disable_pre_forward_hook(param: torch.nn.Parameter) -> Iterator[None]:
    """The parameter's pre-forward hook (it waits for an all-gather) does nothing inside the block."""
    enabled = getattr(param, "_pre_forward_hook_is_enabled", False)
    if enabled:
        param._pre_forward_hook_is_enabled = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if enabled:
            param._pre_forward_hook_is_enabled = True  # type: ignore[attr-defined]


def _multi_tensor_copy(
    buffers_in: Sequence[torch.Tensor],
    buffers_out: Sequence[torch.Tensor],
    dummy_overflow_buf: torch.Tensor | None = None,
) -> None:
    """Copy each tensor of a list into its counterpart, converting dtypes."""
    if buffers_in:
        torch._foreach_copy_(list(buffers_out), list(buffers_in))
