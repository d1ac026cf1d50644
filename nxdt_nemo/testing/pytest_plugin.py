"""The pytest fixtures `gloo`, functions run on ranks that the whole session shares, and `parity`, tables on them.

Room testing/. Load it with `pytest_plugins = ["nxdt_nemo.testing.pytest_plugin"]` in the root conftest.py.
Imports pytest and the pool, no torch. Proof: tests/testing/test_pool.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from nxdt_nemo.testing.pool import RankPools

if TYPE_CHECKING:
    from nxdt_nemo.testing.parity import Parity

__all__ = ["Gloo", "gloo", "parity"]


Gloo = RankPools
"""What the fixture is: gloo(world, function, *args) -> one result a rank."""


@pytest.fixture(scope="session")
def gloo() -> Iterator[Gloo]:
    """One pool for each (world size, init, env), started when first asked for and closed with the session."""
    with RankPools() as pools:
        yield pools


@pytest.fixture(scope="session")
def parity(gloo: Gloo) -> Iterator[Parity]:
    """Rows of a parity table, on the session's ranks; what a recipe gives in a layout is computed once."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    from nxdt_nemo.testing.parity import Parity

    with Parity(pools=gloo) as session:
        yield session
