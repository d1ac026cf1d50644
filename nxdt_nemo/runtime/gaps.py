"""What gloo lacks of torch.distributed, in torch.distributed's own signatures, for upstream's direct calls.

Room runtime/. Stands in for all_reduce with PREMUL_SUM (gloo 2.9 fails in the work's wait, which upstream
never calls: gradients stay unreduced in silence) or with the mean of whole numbers (NCCL cuts it to one),
_coalescing_manager with a device (no startCoalescing), the list form of all_to_all, the list forms of all_gather and
reduce_scatter where ranks have different sizes (experts' tokens), and isend of a tensor that gives its memory back
while it is sent. Imports torch.
Proof: tests/runtime/test_gaps.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

__all__ = ["PremulSum", "all_gather", "all_reduce", "all_to_all", "coalescing", "isend", "reduce_scatter"]


@dataclass(frozen=True)
class PremulSum:
    """The reduction "multiply by factor, then sum"; what torch.distributed._make_nccl_premul_sum makes."""

    factor: float


def all_reduce(
    tensor: torch.Tensor, op: Any = None, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """torch.distributed.all_reduce that also takes a PremulSum, and is done when it returns.

    On CUDA the stream orders the result before its next reader, so upstream drops the handle (NeMo's
    optimizer_with_main_params); gloo has no such order, so an asynchronous call is waited for here.
    """
    if isinstance(op, PremulSum):
        tensor.mul_(op.factor)
        op = None
    op = dist.ReduceOp.SUM if op is None else op
    whole = op == dist.ReduceOp.AVG and not tensor.is_floating_point()
    if whole:
        op = dist.ReduceOp.SUM
    work: dist.Work | None = dist.all_reduce(tensor, op=op, group=group, async_op=async_op)
    if work is not None:
        work.wait()
    if whole:
        tensor.div_(dist.get_world_size(group), rounding_mode="trunc")
    return work


@contextmanager
def coalescing(
    group: dist.ProcessGroup | None = None, device: torch.device | None = None, async_ops: bool = False
) -> Iterator[Any]:
    """torch.distributed._coalescing_manager without the device, which makes it call startCoalescing."""
    with _coalescing_manager(group, device=None, async_ops=async_ops) as manager:
        yield manager


def all_to_all(
    output_tensor_list: Sequence[torch.Tensor],
    input_tensor_list: Sequence[torch.Tensor],
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """torch.distributed.all_to_all by all_to_all_single; is done when it returns."""
    received = output_tensor_list[0].new_empty(sum(tensor.numel() for tensor in output_tensor_list))
    work: dist.Work | None = dist.all_to_all_single(
        received,
        torch.cat([tensor.reshape(-1) for tensor in input_tensor_list]),
        [tensor.numel() for tensor in output_tensor_list],
        [tensor.numel() for tensor in input_tensor_list],
        group=group,
        async_op=async_op,
    )
    if work is not None:
        work.wait()
    parts = received.split([tensor.numel() for tensor in output_tensor_list])
    for tensor, part in zip(output_tensor_list, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
    return work


def isend(
    tensor: torch.Tensor,
    dst: int | None = None,
    group: dist.ProcessGroup | None = None,
    tag: int = 0,
    group_dst: int | None = None,
) -> dist.Work | None:
    """torch.distributed.isend that keeps the memory until it is sent.

    A pipeline stage drops its output by `output.data = torch.empty(1)` (deallocate_pipeline_outputs) as soon as the
    transfer is started: on CUDA the memory's next use comes later in the stream; gloo would read freed memory.
    """
    work: dist.Work | None = dist.isend(tensor.detach(), dst, group, tag, group_dst)
    return work


def all_gather(
    tensor_list: Sequence[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """torch.distributed.all_gather, also of tensors of different sizes, as NCCL has it; those are there on return."""
    if len({part.shape for part in tensor_list}) == 1:
        equal: dist.Work | None = dist.all_gather(list(tensor_list), tensor, group=group, async_op=async_op)
        return equal
    return all_to_all(tensor_list, [tensor] * len(tensor_list), group, async_op)


def reduce_scatter(
    output: torch.Tensor,
    input_list: Sequence[torch.Tensor],
    op: Any = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """torch.distributed.reduce_scatter, also of tensors of different sizes (sums only); those are there on return."""
    op = dist.ReduceOp.SUM if op is None else op
    if len({part.shape for part in input_list}) == 1:
        equal: dist.Work | None = dist.reduce_scatter(output, list(input_list), op, group, async_op)
        return equal
    if op != dist.ReduceOp.SUM:
        raise ValueError(f"reduce_scatter of tensors of different sizes with op={op}: gloo has sums only")
    parts = [torch.empty_like(output) for _ in input_list]
    work = all_to_all(parts, input_list, group, async_op)
    torch.sum(torch.stack(parts), 0, out=output)
    return work
