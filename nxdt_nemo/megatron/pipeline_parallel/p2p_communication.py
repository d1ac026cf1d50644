"""Transfers between pipeline stages that stay apart when both neighbours are one rank.

Room megatron/. Stands in for megatron.core.pipeline_parallel.p2p_communication._batched_p2p_ops. Transfers between two
ranks are matched in the order they are started. Upstream starts to `prev` before to `next`, and receives in that order
too; with two stages what goes to `prev` arrives from `next`, so the interleaved schedule takes gradients for
activations there (Megatron-LM's argument parser refuses it, NeMo does not). Receives in the opposite order are right
for any number of stages. A traced lane gets all of them at once: in a graph nothing runs beside anything else, so both
neighbours have to put their transfers in one order, which only who knows both directions can.
Proof: tests/megatron/test_layouts.py (pp2vpp2), tests/megatron/test_xla.py, tests/runtime/test_xla_world.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nxdt_nemo.runtime import current
from nxdt_nemo.runtime.ops import Arriving

__all__ = ["batched_p2p_ops"]


def batched_p2p_ops(
    *,
    tensor_send_prev: Tensor | None,
    tensor_recv_prev: Tensor | None,
    tensor_send_next: Tensor | None,
    tensor_recv_next: Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> list[Any]:
    """Start what is not None; ranks are global ones. Returns the works to wait for."""
    wanted = (
        (dist.isend, tensor_send_prev, prev_pipeline_rank),
        (dist.isend, tensor_send_next, next_pipeline_rank),
        (dist.irecv, tensor_recv_next, next_pipeline_rank),
        (dist.irecv, tensor_recv_prev, prev_pipeline_rank),
    )
    ops = [dist.P2POp(start, tensor, peer, group) for start, tensor, peer in wanted if tensor is not None]
    if not ops:
        return []
    return [_together(ops, group)] if current().traced else dist.batch_isend_irecv(ops)


def _together(ops: Sequence[dist.P2POp], group: dist.ProcessGroup) -> _Transfers:
    """One exchange of the lane's."""
    ours = current().group_of(group)
    place = {rank: index for index, rank in enumerate(ours.ranks)}
    sends = [(one.tensor.detach(), place[one.peer]) for one in ops if one.op is dist.isend]
    targets = [(one.tensor, place[one.peer]) for one in ops if one.op is dist.irecv]
    receives = [(tuple(tensor.shape), tensor.dtype, peer) for tensor, peer in targets]
    return _Transfers(ours.ops.exchange(sends, receives, ours), [tensor for tensor, _ in targets])


class _Transfers:
    """What upstream waits for: what arrives is written then."""

    def __init__(self, arriving: Arriving, targets: Sequence[Tensor]) -> None:
        self._arriving, self._targets = arriving, targets

    @torch.no_grad()
    def wait(self) -> None:
        for target, arrived in zip(self._targets, self._arriving.wait(), strict=True):
            target.copy_(arrived)
