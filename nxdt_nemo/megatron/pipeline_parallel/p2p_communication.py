"""Transfers between pipeline stages that stay apart when both neighbours are one rank.

Room megatron/. Stands in for megatron.core.pipeline_parallel.p2p_communication._batched_p2p_ops. Transfers between two
ranks are matched in the order they are started. Upstream starts to `prev` before to `next`, and receives in that order
too; with two stages what goes to `prev` arrives from `next`, so the interleaved schedule takes gradients for
activations there (Megatron-LM's argument parser refuses it, NeMo does not). Receives in the opposite order are right
for any number of stages. Proof: tests/megatron/test_layouts.py (pp2vpp2).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

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
    return dist.batch_isend_irecv(ops) if ops else []
