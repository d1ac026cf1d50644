"""The xla lane on XLA:CPU, in processes of their own: device, random numbers, values read later, modules, ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.on_a_lane import PLACED, by_the_table, expected, placed
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPools, lane_here
from nxdt_nemo.testing.traced import TRACED_ENV

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def pools(with_torch_xla: None) -> Iterator[Callable[..., list[Any]]]:
    """pools(world, function, *args) on ranks whose lane is xla."""
    with RankPools() as pools:
        yield lambda world, function, *args: pools(world, function, *args, init=ACTIVE, env=TRACED_ENV, group=False)


def device() -> dict[str, Any]:
    import torch.distributed as dist

    lane = lane_here()
    figures = lane.memory()
    return {
        "type": lane.device().type,
        "name": lane.name_of_device(),
        "PJRT_DEVICE": os.environ["PJRT_DEVICE"],
        "dtypes": [lane.supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)],
        "memory": 0 < figures.allocated <= figures.reserved <= figures.peak <= lane.total_memory(),
        "new_group": dist.new_group.__module__,
    }


def test_the_device(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, device) == [
        {
            "type": "xla",
            "name": "XLA:CPU",
            "PJRT_DEVICE": "CPU",
            "dtypes": [True, True, False, False],
            "memory": True,
            "new_group": "torch.distributed.distributed_c10d",  # torch_xla replaces it for everyone
        }
    ]


def draws() -> dict[str, list[float]]:
    """The same seed twice, a state put back, and a seed beyond 63 bits; with a boundary between."""
    lane = lane_here()

    def three() -> torch.Tensor:
        return torch.rand(3, device=lane.device())

    lane.manual_seed(5)
    first = three()
    lane.step_boundary()
    state = lane.rng_state()
    second = three()
    lane.step_boundary()
    lane.set_rng_state(state)
    again = three()
    lane.manual_seed(5)
    found = {"first": first, "second": second, "again": again, "anew": three()}
    lane.manual_seed(2**64 - 3)
    state = lane.rng_state()
    found["large"] = three()
    lane.set_rng_state(state)
    found["large again"] = three()
    return {name: value.cpu().tolist() for name, value in found.items()}


def test_random_states(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, draws)
    assert found["first"] == found["anew"] != found["second"] == found["again"]
    assert found["large"] == found["large again"] != found["first"]


def deferred() -> list[list[float]]:
    """What has arrived after each of three boundaries."""
    lane, arrived, after = lane_here(), [], []
    x = torch.ones(2, device=lane.device())
    for step in range(3):
        lane.defer(lambda value: arrived.append(float(value.sum())), x * step)
        lane.step_boundary()
        after.append(list(arrived))
    return after


def test_values_are_read_a_step_later(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, deferred) == [[[], [0.0], [0.0, 2.0]]]


def test_a_placed_module_keeps_marks_and_ties(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, placed) == [{"devices": {"xla:0"}, **PLACED}]


def collectives() -> dict[str, Any]:
    """By the lane's table, and by torch.distributed's own calls."""
    import torch.distributed as dist

    x, found = by_the_table()
    ours = x.clone()
    dist.all_reduce(ours)
    whole = torch.empty(4, 2, device=x.device)
    dist.all_gather_into_tensor(whole, x)
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    mine = torch.empty(1, 2, device=x.device)
    dist.reduce_scatter_tensor(mine, x)
    swapped, mean = torch.empty_like(x), torch.empty(2, 1, device=x.device)
    dist.all_to_all_single(swapped, x)
    dist.reduce_scatter_tensor(mean, torch.stack([x[:1].T, x[:1].T]), op=dist.ReduceOp.AVG)
    found |= {"dist.sum": ours, "dist.whole": whole, "dist.parts": torch.cat(parts), "dist.mine": mine}
    found |= {"dist.swapped": swapped, "dist.mean": mean.T}
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": dist.get_rank()})
    dist.barrier()
    return {name: value.cpu().tolist() for name, value in found.items()} | {"objects": objects}


def test_two_processes(pools: Callable[..., list[Any]]) -> None:
    zero, one = [[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]
    total = [[10.0, 12.0], [14.0, 16.0]]
    alike = {
        "dist.mean": [[5.0, 6.0]],
        "dist.sum": total,
        "dist.whole": zero + one,
        "dist.parts": zero + one,
        "objects": [{"rank": 0}, {"rank": 1}],
    }
    own = [expected(rank) | {"dist.mine": [total[rank]], "dist.swapped": [zero[rank], one[rank]]} for rank in range(2)]
    assert pools(2, collectives) == [alike | part for part in own]


def refused() -> list[str]:
    import torch.distributed as dist

    from nxdt_nemo.errors import LaneError

    lane, said = lane_here(), []
    x = torch.ones(2, device=lane.device())
    calls = (
        lambda: dist.all_reduce(x, op=dist.ReduceOp.PRODUCT),
        lambda: dist.gather(x, [x.clone()], dst=0),
        lambda: dist.reduce_scatter_tensor(x, x.clone(), op=dist.ReduceOp.MAX),
        lambda: lane.world().pg.send([x], 0),
    )
    for call in calls:
        try:
            call()
        except LaneError as error:
            said.append(str(error))
    return said


def test_what_has_no_counterpart_says_so(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, refused)
    assert "reducing by" in found[0] and "sum, avg, max, min" in found[0]
    assert "gather of tensors on the device has no counterpart" in found[1]
    assert "reduce_scatter by max" in found[2]
    assert "send of tensors on the device has no counterpart" in found[3]
