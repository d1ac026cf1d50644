"""Groups of ranks: a torch ProcessGroup together with the list of all such groups in the world.

Room runtime/. Upstream knows only its own rank's ProcessGroup; a traced collective needs every group of the
world. Imports torch for type checking only. Proof: tests/runtime/test_groups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

    from nxdt_nemo.runtime.ops import Ops

__all__ = ["Group", "Mesh", "checked_mesh"]

Mesh = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """The group of one rank.

    name   what it is for ("tp", "dp")
    mesh   all groups of the world that were made with it, as global ranks
    ranks  the members of this one, as global ranks, ascending
    rank   this process's place in `ranks`
    size   len(ranks)
    pg     torch's handle, for upstream's own torch.distributed calls
    ops    the lane's raw collectives
    """

    name: str
    mesh: Mesh
    ranks: tuple[int, ...]
    rank: int
    size: int
    pg: dist.ProcessGroup = field(repr=False)
    ops: Ops = field(repr=False)


def checked_mesh(mesh: Sequence[Sequence[int]], world: int, name: str) -> Mesh:
    """`mesh` as tuples. Raises ValueError unless each rank below `world` is in one group, ascending."""
    groups = tuple(tuple(int(rank) for rank in ranks) for ranks in mesh)
    listed = [rank for ranks in groups for rank in ranks]
    if not all(groups):
        raise ValueError(f"mesh of group {name}: an empty group")
    twice = sorted({rank for rank in listed if listed.count(rank) > 1})
    if twice:
        raise ValueError(f"mesh of group {name}: ranks {twice} are listed more than once")
    outside = sorted(rank for rank in listed if not 0 <= rank < world)
    if outside:
        raise ValueError(f"mesh of group {name}: ranks {outside} are not in a world of {world}")
    missing = sorted(set(range(world)) - set(listed))
    if missing:
        raise ValueError(f"mesh of group {name}: ranks {missing} are in no group; give each a group of its own")
    turned = [list(ranks) for ranks in groups if list(ranks) != sorted(ranks)]
    if turned:
        raise ValueError(f"mesh of group {name}: ranks {turned[0]} are not ascending, and torch sorts a group's ranks")
    return groups
