"""A process group that nobody holds any more is gone, with its thread."""

from __future__ import annotations

import gc

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pytest_plugin import Gloo

pytestmark = pytest.mark.ranks


def threads() -> int:
    """Of this process, gloo's included."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads"))


def left_over() -> int:
    """Threads that four layouts leave behind, each asked for the lane's view of its groups."""
    from megatron.core import parallel_state

    from nxdt_nemo.runtime import current
    from nxdt_nemo.testing.ours import forget_groups

    counts = []
    for _ in range(6):
        forget_groups()
        gc.collect()
        counts.append(threads())
        parallel_state.initialize_model_parallel(2)
        current().group_of(parallel_state.get_tensor_model_parallel_group())
    forget_groups()
    return counts[-1] - counts[1]  # the first layout warms up


def test_layouts_leave_no_threads(gloo: Gloo) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    assert max(gloo(2, left_over, init=ACTIVE, env=ACTIVE_ENV)) < 4
