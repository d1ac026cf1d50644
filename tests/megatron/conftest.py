"""One rank with the backend active, shared by this folder's tests: megatron-core is imported once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pytest_plugin import Gloo


@pytest.fixture(scope="session")
def active(gloo: Gloo) -> Callable[..., Any]:
    """active(function, *args): its result, from a process in which the backend is active."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    return lambda function, *args: gloo(1, function, *args, init=ACTIVE, env=ACTIVE_ENV)[0]
