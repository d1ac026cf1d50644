"""A rank's part of a tensor, cut by the lane.

Room megatron/. Stands in for megatron.core.tensor_parallel.mappings._split_along_first_dim and _split_along_last_dim,
which scatter_to_sequence_parallel_region and its like are made of: upstream slices at rank * size, a number that
differs between the ranks' graphs. May import torch and nxdt_nemo.runtime. Proof: tests/megatron/test_mappings.py.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from nxdt_nemo.runtime.select import current

__all__ = ["split_along_first_dim", "split_along_last_dim"]


def split_along_first_dim(input_: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ..] from [t*n, ..], contiguous. Raises ValueError if the group's size t does not divide it."""
    return _part(input_, 0, group)


def split_along_last_dim(input_: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[.., n] from [.., t*n], contiguous. Raises ValueError if the group's size t does not divide it."""
    return _part(input_, input_.dim() - 1, group)


def _part(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return x
    mine = current().group_of(group)
    return mine.ops.shard(x, dim, mine).contiguous()
