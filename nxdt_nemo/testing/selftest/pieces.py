"""What a rank of the self-test does: its device, its dtypes, its collectives, against values from the host.

Room testing/. Runs in a rank of a pool with init=ACTIVE and group=False. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nxdt_nemo.runtime import collectives, current

if TYPE_CHECKING:
    import torch

__all__ = ["collective_errors", "device", "dtype_errors"]

SIZE = 256


def _lane() -> Any:
    lane = current()
    lane.init_ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return lane


def device() -> dict[str, Any]:
    """What the lane says of its device, and 3 x 3 that was there and back."""
    import torch

    lane = _lane()
    there = torch.arange(9.0).reshape(3, 3).to(lane.device())
    figures = lane.memory()
    return {
        "lane": lane.name,
        "device": lane.name_of_device(),
        "type": lane.device().type,
        "count": lane.device_count(),
        "memory": lane.total_memory(),
        "used": figures.reserved,
        "back": (there + 1).cpu().tolist() == (torch.arange(9.0).reshape(3, 3) + 1).tolist(),
    }


def dtype_errors() -> dict[str, tuple[float, float]]:
    """For each dtype that trains here: the error of a product of 256 x 256 and of a softmax, relative to float64's.

    The first is over the largest element. float32 keeps 1e-5 where a device computes it as float32; above 1e-3 it
    was cast to fewer bits.
    """
    import torch

    lane = _lane()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        if lane.supports(dtype):
            x, y = (value.to(dtype).to(lane.device()) for value in (a, b))
            exact_x, exact_y = (value.to(dtype).double() for value in (a, b))
            product = _error(x @ y, exact_x @ exact_y)
            soft = _error(torch.softmax(x, -1), torch.softmax(exact_x, -1))
            found[str(dtype).removeprefix("torch.")] = (product, soft)
    return found


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.cpu().double() - exact).abs().max() / exact.abs().max())


def collective_errors() -> dict[str, float]:
    """The largest difference of each collective of the world's ranks from what it has to give."""
    import torch

    lane = _lane()
    world = lane.world()
    rank, size = world.rank, world.size
    whole = torch.arange(float(size * 4)).reshape(size * 2, 2)

    def mine(of: int) -> torch.Tensor:
        return whole * (of + 1)

    here = mine(rank).to(lane.device())
    total = torch.stack([mine(of) for of in range(size)]).sum(0)
    calls: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "all_reduce": (lambda: collectives.reduce(here, world), total),
        "all_gather": (lambda: collectives.all_gather(here, 0, world), torch.cat([mine(of) for of in range(size)])),
        "reduce_scatter": (lambda: collectives.reduce_scatter(here, 0, world), total[rank * 2 : rank * 2 + 2]),
        "all_to_all": (
            lambda: collectives.all_to_all(here, world),
            torch.cat([mine(of)[rank * 2 : rank * 2 + 2] for of in range(size)]),
        ),
        "broadcast": (lambda: collectives.broadcast_(here.clone(), size - 1, world), mine(size - 1)),
    }
    found = {}
    for name, (call, wanted) in calls.items():
        found[name] = float((call().detach().cpu() - wanted).abs().max())
        lane.step_boundary()
    return found
