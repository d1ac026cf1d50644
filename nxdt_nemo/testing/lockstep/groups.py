"""Process groups for tests: a wait ends, and a suite that never destroys its groups drowns in no threads of theirs.

Room testing/. For nxdt_nemo.testing.lockstep.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

__all__ = ["limit_groups"]


def limit_groups(wait_s: float) -> None:
    """From now on in this process: no process group waits longer, new_group makes each once, and all share a thread.

    Three threads come with each gloo group, one of which wakes up a hundred times a second; megatron-core makes tens of
    groups for each test and drops them. Which groups there are, and in which order they are made, is the same on all
    ranks, so that one group can serve all requests for the same ranks and backend.
    """
    import torch.distributed as dist

    _share_loop()
    made: dict[Any, Any] = {}
    limit = timedelta(seconds=wait_s)
    init_process_group, new_group, destroy_process_group = (
        dist.init_process_group,
        dist.new_group,
        dist.destroy_process_group,
    )

    def shorter(asked: timedelta | None) -> timedelta:
        return limit if asked is None else min(asked, limit)

    @functools.wraps(init_process_group)
    def init(backend: str | None = None, init_method: str | None = None, timeout: Any = None, **named: Any) -> None:
        init_process_group(backend, init_method, shorter(timeout), **named)

    @functools.wraps(new_group)
    def new(
        ranks: Sequence[int] | None = None, timeout: timedelta | None = None, backend: str | None = None, **named: Any
    ) -> Any:
        key = None if ranks is None else tuple(ranks), backend or dist.get_backend()
        if key not in made:
            named.pop("pg_options", None)
            made[key] = new_group(ranks, shorter(timeout), backend, **named)
        return made[key]

    @functools.wraps(destroy_process_group)
    def destroy(group: Any = None) -> None:
        if group is None or group is dist.group.WORLD:
            made.clear()
            destroy_process_group(group)
        # else it stays: others share it, and only its own ranks say this

    replaced: Any = dist
    replaced.init_process_group, replaced.new_group, replaced.destroy_process_group = init, new, destroy


def _share_loop() -> None:
    """Let gloo groups that are made from now on listen in one thread.

    Connected at once: with lazy_init, or TORCH_GLOO_LAZY_INIT, eight ranks on several groups wait for each other.
    """
    from torch.distributed import distributed_c10d as c10d

    gloo: Any = c10d.ProcessGroupGloo
    devices: list[Any] = []

    class Sharing:
        """In place of ProcessGroupGloo, which torch calls, and asks what is one."""

        def __call__(self, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
            if not devices:
                devices.append(gloo.create_device(interface="lo", lazy_init=False))
            options = gloo._Options()
            options._devices, options._timeout = devices, timeout
            return gloo(store, rank, size, options)

        def __instancecheck__(self, instance: object) -> bool:
            return isinstance(instance, gloo)

    c10d.ProcessGroupGloo = Sharing()  # type: ignore[assignment, misc]
