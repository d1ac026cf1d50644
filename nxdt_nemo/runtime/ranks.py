"""Ranks and groups through torch.distributed: what lanes share whose process groups torch makes.

Room runtime/. Imports torch when used, so that a lane can be probed without. Proof: tests/runtime/test_groups.py.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.groups import Group, Mesh, Meshes, checked_mesh
from nxdt_nemo.runtime.lane import Lane

if TYPE_CHECKING:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

    from nxdt_nemo.runtime.gaps import PremulSum

__all__ = ["RanksLane"]


class RanksLane(Lane):
    """One process a rank; a process group of the lane's backend for each group."""

    def __init__(self) -> None:
        # Weak at both ends: a Group holds its process group, whose gloo threads live as long as that is held.
        self._groups: weakref.WeakKeyDictionary[dist.ProcessGroup, weakref.ref[Group]] = weakref.WeakKeyDictionary()
        self._made: weakref.WeakKeyDictionary[dist.ProcessGroup, Mesh] = weakref.WeakKeyDictionary()
        self._meshes = Meshes()

    def init_ranks(
        self,
        rank: int,
        world: int,
        *,
        init_method: str | None = None,
        store: Store | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        import torch.distributed as dist

        if not 0 <= rank < world:
            raise LaneError(f"rank {rank} is not in a world of {world}", place="init_ranks")
        if dist.is_initialized():
            self._check_running(rank, world)
            self.ranks_are_up()
            return
        if store is None and init_method is None:
            _check_launcher(rank, world)
        self.register_backend()
        dist.init_process_group(
            self.backend, init_method=init_method, store=store, rank=rank, world_size=world, timeout=timeout
        )
        self.ranks_are_up()

    def _check_running(self, rank: int, world: int) -> None:
        import torch.distributed as dist

        found = (dist.get_backend(), dist.get_rank(), dist.get_world_size())
        if found != (self.backend, rank, world):
            raise LaneError(
                f"torch.distributed is up with backend {found[0]}, rank {found[1]} of {found[2]}; "
                f"the {self.name} lane was asked for backend {self.backend}, rank {rank} of {world}",
                place="init_ranks",
                fix="let the lane bring up the ranks, or ask for what is there",
            )

    def close_ranks(self) -> None:
        import torch.distributed as dist

        self._groups.clear()
        self._made.clear()
        self._meshes.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def groups(self, mesh: Sequence[Sequence[int]], name: str) -> Group:
        import torch.distributed as dist

        me = self._rank_for(name)
        checked = checked_mesh(mesh, dist.get_world_size(), name)
        mine: Group | None = None
        for ranks in checked:  # torch wants every rank to make every group, in the same order
            pg = dist.new_group(list(ranks), backend=self.backend, group_desc=name)
            if me in ranks:
                mine = Group(name, checked, ranks, ranks.index(me), len(ranks), pg, self.ops)
                self._groups[pg], self._made[pg] = weakref.ref(mine), checked
        assert mine is not None, "checked_mesh lets no rank out"
        return mine

    def world(self) -> Group:
        import torch.distributed as dist

        self._rank_for("world")
        everyone = dist.group.WORLD
        assert everyone is not None, "there are ranks"
        return self.group_of(everyone)

    def group_of(self, process_group: dist.ProcessGroup) -> Group:
        import torch.distributed as dist

        known = self._groups.get(process_group)
        group = known() if known is not None else None
        if group is None:
            ranks = tuple(dist.get_process_group_ranks(process_group))
            noted = self._made.get(process_group) or self._meshes.of(process_group, dist.get_world_size())
            me, mesh, name = dist.get_rank(process_group), noted or (ranks,), process_group.group_desc
            group = Group(name, mesh, ranks, me, len(ranks), process_group, self.ops)
            self._groups[process_group] = weakref.ref(group)
        return group

    def note_group(self, name: str, ranks: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        self._meshes.note(name, ranks, process_group)

    def close_meshes(self) -> None:
        self._meshes.close()

    def _rank_for(self, name: str) -> int:
        import torch.distributed as dist

        if not dist.is_initialized():
            raise LaneError(f"group {name} needs ranks, and none are up", fix="call init_ranks first")
        return dist.get_rank()

    def shard(self, tensor: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        return self.ops.shard(tensor, dim, group)

    def premul_sum(self, factor: float) -> PremulSum:
        from nxdt_nemo.runtime.gaps import PremulSum

        return PremulSum(factor)

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> dist.Work | None:
        from nxdt_nemo.runtime import gaps

        return gaps.all_reduce(tensor, op, group, async_op)

    def coalescing(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None, async_ops: bool = False
    ) -> AbstractContextManager[Any]:
        from nxdt_nemo.runtime import gaps

        return gaps.coalescing(group, device, async_ops)

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """torch.distributed.barrier for upstream's calls."""
        import torch.distributed as dist

        dist.barrier(group)


def _check_launcher(rank: int, world: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world}.items():
        said = os.environ.get(name)
        if said is not None and said != str(value):
            raise LaneError(f"{name}={said} in the environment, but the caller says {value}", place="init_ranks")
