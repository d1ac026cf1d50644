"""The pytest fixture `gloo`: functions run on ranks that the whole session shares.

Room testing/. Load it with `pytest_plugins = ["nxdt_nemo.testing.pytest_plugin"]` in the root conftest.py.
Imports pytest and the pool, no torch. Proof: tests/testing/test_pool.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import pytest

from nxdt_nemo.testing.pool import RankPool

__all__ = ["Gloo", "gloo"]


class Gloo(Protocol):
    """What the fixture is: gloo(world, function, *args) -> one result a rank."""

    def __call__(
        self,
        world: int,
        function: str | Callable[..., Any],
        *args: Any,
        init: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> list[Any]: ...


@pytest.fixture(scope="session")
def gloo() -> Iterator[Gloo]:
    """One pool for each (world size, init, env), started when first asked for and closed with the session."""
    pools: dict[tuple[Any, ...], RankPool] = {}

    def run(
        world: int,
        function: str | Callable[..., Any],
        *args: Any,
        init: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        key = (world, init, tuple(sorted((env or {}).items())))
        pool = pools.setdefault(key, RankPool(world, env=env or {}, init=init))
        return pool.run(function, *args, timeout=timeout)

    yield run
    for pool in pools.values():
        pool.close()
