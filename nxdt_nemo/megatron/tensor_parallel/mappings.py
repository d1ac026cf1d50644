"""Gathering and scattering of parts that differ in size between tensor-parallel ranks.

Room megatron/. Wraps _gather_along_first_dim and _reduce_scatter_along_first_dim of
megatron.core.tensor_parallel.mappings, whose calls with sizes (ragged experts on several tensor- and expert-parallel
ranks) gloo refuses unless all are alike. May import torch and nxdt_nemo.runtime. Proof: tests/megatron/test_moe.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nxdt_nemo.runtime import current

__all__ = ["gather_along_first_dim", "reduce_scatter_along_first_dim"]

Function = Callable[..., Tensor]


def gather_along_first_dim(
    original: Function,
    input_: Tensor,
    group: Any,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """[sum(n), ...] from this rank's [n[rank], ...], n = output_split_sizes; upstream's where they are alike."""
    if output_split_sizes is None or len(set(output_split_sizes)) == 1:
        return original(input_, group, output_split_sizes, use_global_buffer)
    of_all, largest = current().group_of(group), max(output_split_sizes)
    whole = of_all.ops.all_gather(_filled(input_, largest), 0, of_all)
    parts = zip(whole.split(largest), output_split_sizes, strict=True)
    return torch.cat([part[:rows] for part, rows in parts])


def reduce_scatter_along_first_dim(
    original: Function,
    input_: Tensor,
    group: Any,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """This rank's [n[rank], ...] of the sum of all ranks' [sum(n), ...]; upstream's where the sizes are alike."""
    if input_split_sizes is None or len(set(input_split_sizes)) == 1:
        return original(input_, group, input_split_sizes, use_global_buffer)
    of_all, largest = current().group_of(group), max(input_split_sizes)
    filled = torch.cat([_filled(part, largest) for part in input_.split(list(input_split_sizes))])
    return of_all.ops.reduce_scatter(filled, 0, of_all)[: input_split_sizes[of_all.rank]]


def _filled(rows: Tensor, number: int) -> Tensor:
    """Zeros after the rows, to this number of them."""
    return torch.cat([rows, rows.new_zeros(number - rows.shape[0], *rows.shape[1:])])
