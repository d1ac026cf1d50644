"""A process group that nobody holds any more is gone, with its thread: a rank at rest costs nothing."""

from __future__ import annotations

from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.parity import Parity
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Family, Recipe, layout

pytestmark = pytest.mark.ranks


def threads() -> int:
    """Of this process, gloo's included."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads"))


def left_over(recipe: Recipe, weights: dict[str, Any], place: str) -> int:
    """Threads that runs leave behind, the lane's views of their groups included."""
    from nxdt_nemo.testing.ours import train

    counts = []
    for _ in range(3):
        train(recipe, weights, layout(place), steps=range(1))
        counts.append(threads())
    return counts[-1] - counts[0]  # the first run warms up


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place"), [("gpt", "tp2"), ("mixtral", "ep2dp2")])
def test_layouts_leave_no_threads(gloo: Gloo, parity: Parity, family: Family, place: str) -> None:
    recipe = Recipe.of(family, steps=1)
    assert max(gloo(2, left_over, recipe, parity.weights(recipe), place, init=ACTIVE, env=ACTIVE_ENV)) < 4
