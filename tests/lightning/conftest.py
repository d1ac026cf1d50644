"""Ranks whose lane has a device that is not the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.traced import TRACED_ENV


@pytest.fixture(scope="package")
def on_xla(with_torch_xla: None) -> Iterator[Callable[..., Any]]:
    """on_xla(function, *args): its result, from a rank whose lane is xla; lane_here() brings the rank up."""
    with RankPool(1, env=TRACED_ENV, init=ACTIVE, group=False) as pool:
        yield lambda function, *args: pool.run(function, *args)[0]
