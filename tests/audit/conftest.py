"""For tests of audits: one process on the xla lane, which lowers any ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.traced import TRACED_ENV


@pytest.fixture(scope="package")
def pool(with_torch_xla: None) -> Iterator[RankPool]:
    """A process on the xla lane."""
    with RankPool(1, env=TRACED_ENV, init="nxdt_nemo:activate", group=False, timeout=600) as found:
        yield found


@pytest.fixture(scope="package")
def audited(pool: RankPool) -> Callable[..., dict[str, Any]]:
    """audited(overrides, world, **more): nxdt_nemo.testing.audited's, in that process."""
    return lambda *args, **more: pool.run(_audited, args, more)[0]  # type: ignore[no-any-return]


def _audited(args: tuple[list[str], int], more: dict[str, Any]) -> dict[str, Any]:
    from nxdt_nemo.testing.audited import audited

    return audited(*args, **more)
