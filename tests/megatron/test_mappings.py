"""Scattering over tensor-parallel ranks: each rank's part, its gradient gathered, the cut left to the lane."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.recipe import Layout, Recipe

pytestmark = pytest.mark.ranks

SHAPE = (4, 3, 6)


def scattered(function: str, cuts: bool) -> dict[str, Any]:
    """One rank's part and the gradient of what was cut; cuts=False lets the lane hand out the first part only."""
    from unittest import mock

    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from nxdt_nemo.runtime.select import current

    _model_parallel(Recipe.of("gpt"), Layout(tp=dist.get_world_size()))
    try:
        x = torch.arange(72.0).view(SHAPE).requires_grad_()
        first = lambda tensor, dim, group: tensor.narrow(dim, 0, tensor.shape[dim] // group.size)  # noqa: E731
        ops = current().ops
        with mock.patch.object(ops, "shard", ops.shard if cuts else first):
            part = getattr(tensor_parallel, function)(x, group=parallel_state.get_tensor_model_parallel_group())
        part.backward(part.detach() + 1)
        return {"part": part.detach(), "gradient": x.grad, "contiguous": part.is_contiguous()}
    finally:
        forget_groups()


@pytest.mark.parametrize(
    ("function", "dim"),
    [("scatter_to_sequence_parallel_region", 0), ("scatter_to_tensor_model_parallel_region", 2)],
)
def test_each_rank_gets_its_part(gloo, function, dim):
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    whole = torch.arange(72.0).view(SHAPE)
    parts = gloo(2, scattered, function, True, init=ACTIVE, env=ACTIVE_ENV)
    for found, expected in zip(parts, whole.chunk(2, dim), strict=True):
        assert torch.equal(found["part"], expected) and found["contiguous"]
        assert torch.equal(found["gradient"], whole + 1)
    blind = gloo(2, scattered, function, False, init=ACTIVE, env=ACTIVE_ENV)  # the control: it is the lane that cuts
    assert torch.equal(blind[1]["part"], blind[0]["part"])
