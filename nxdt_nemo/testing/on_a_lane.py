"""What every lane with a device of its own must do, as functions for the ranks of a pool with group=False.

Room testing/. Imports torch. Proof: tests/runtime/test_xla.py, tests/runtime/test_neuron.py.
"""

from __future__ import annotations

from typing import Any

import torch

from nxdt_nemo.testing.pool import lane_here

__all__ = ["PLACED", "by_the_table", "expected", "placed"]

PLACED = {"marked": True, "tied": True, "trains": True}


def placed() -> dict[str, Any]:
    """Two layers that share a weight, placed in one call: where they are, and what is left of marks and ties."""
    lane = lane_here()
    layer = torch.nn.Linear(2, 2)
    layer.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    layer.register_buffer("counts", torch.zeros(2))
    tied = torch.nn.Linear(2, 2)
    tied.weight = layer.weight
    both = torch.nn.ModuleList([layer, tied])
    assert lane.place(both) is both
    return {
        "devices": {str(x.device) for x in (*both.parameters(), *both.buffers())},
        "marked": getattr(layer.weight, "tensor_model_parallel", False),
        "tied": layer.weight is tied.weight,
        "trains": layer.weight.requires_grad and isinstance(layer.weight, torch.nn.Parameter),
    }


def by_the_table() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A rank's [[0, 1], [2, 3]] + 10 rank, of two ranks, and what the lane's collectives make of it; see expected."""
    import torch.distributed as dist

    lane = lane_here()
    group, ops = lane.world(), lane.ops
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]], device=lane.device()) + 10 * dist.get_rank()
    return x, {
        "sum": ops.all_reduce_(x.clone(), group, "sum"),
        "avg": ops.all_reduce_(x.clone(), group, "avg"),
        "halves": ops.all_reduce_(x.clone(), group, lane.premul_sum(0.5)),
        "max": ops.all_reduce_(x.clone(), group, "max"),
        "broadcast": ops.broadcast_(x.clone(), 1, group),
        "all_gather": ops.all_gather(x, 1, group),
        "reduce_scatter": ops.reduce_scatter(x, 1, group),
        "all_to_all": ops.all_to_all(x, group, None, None),
        "permute": ops.permute(x, [(0, 1)], group),
        "shard": ops.shard(x, 1, group),
    }


def expected(rank: int) -> dict[str, list[list[float]]]:
    """by_the_table's, counted by hand."""
    zero, one = [[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]
    total = [[10.0, 12.0], [14.0, 16.0]]
    return {
        "sum": total,
        "avg": [[5.0, 6.0], [7.0, 8.0]],
        "halves": [[5.0, 6.0], [7.0, 8.0]],
        "max": one,
        "broadcast": one,
        "all_gather": [[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]],
        "reduce_scatter": [[row[rank]] for row in total],
        "all_to_all": [zero[rank], one[rank]],
        "permute": zero if rank else [[0.0, 0.0], [0.0, 0.0]],
        "shard": [[row[rank]] for row in (one if rank else zero)],
    }
