"""What megatron-core's persistent writer of checkpoints is given.

Room megatron/. Stands in for a method of megatron.core.dist_checkpointing.strategies.async_utils.
Proof: tests/megatron/test_async_utils.py, test_filesystem_async.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["schedule_async_call"]


def schedule_async_call(original: Callable[..., None], self: Any, async_req: Any) -> None:
    """Upstream's, with tensors as they are now: the writer, started by spawn, shares the memory of a CPU tensor.

    On CUDA it copies them to the host before training goes on (`preload_fn`); a copy made here leaves it nothing to
    wait for. Needs as much of /dev/shm as this rank saves, as upstream does.
    """
    if async_req.preload_fn:
        rank, buckets, *rest = async_req.async_fn_args
        copies = [
            (path, key, (texts, [(item, _copied(tensor)) for item, tensor in tensors]))
            for path, key, (texts, tensors) in buckets
        ]
        async_req = async_req._replace(async_fn_args=(rank, copies, *rest), preload_fn=None)
    original(self, async_req)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in shared memory, where another process finds it without a second one."""
    memory = torch.UntypedStorage._new_shared(tensor.nbytes)
    return torch.empty(0, dtype=tensor.dtype).set_(memory).view(tensor.shape).copy_(tensor)
