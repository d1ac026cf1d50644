"""Groups of ranks: a torch ProcessGroup together with the list of all such groups in the world.

Room runtime/. Upstream knows only its own rank's ProcessGroup; a traced collective needs every group of the
world. Imports torch for type checking only. Proof: tests/runtime/test_groups.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

    from nxdt_nemo.runtime.ops import Ops

__all__ = ["Group", "Mesh", "Meshes", "checked_mesh", "completed"]

Mesh = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """The group of one rank.

    name   what it is for ("tp", "dp")
    mesh   all groups of the world that were made with it, as global ranks
    ranks  the members of this one, as global ranks, in the order of their places (ascending unless a placement of
           upstream's groups says otherwise, see runtime/placement.py)
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


def completed(groups: Iterable[Sequence[int]], world: int) -> Mesh:
    """The groups, and one of its own for each rank of the world that is in none (a middle stage holds no embedding)."""
    mesh = tuple(tuple(ranks) for ranks in groups)
    inside = {rank for ranks in mesh for rank in ranks}
    return mesh + tuple((rank,) for rank in range(world) if rank not in inside)


@dataclass(eq=False)
class _Layer:
    """Groups of one name that share no rank."""

    groups: list[tuple[int, ...]] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)


class Meshes:
    """Groups that upstream makes one by one, on all ranks alike and in one order, put together by their names.

    Groups of a name that share a rank (upstream's pipelines of an encoder that is smaller than its decoder, or a
    state that is built anew) are of different meshes: each goes into the first that has room for it.
    """

    def __init__(self) -> None:
        self._open: dict[str, list[_Layer]] = {}
        self._layers: weakref.WeakKeyDictionary[dist.ProcessGroup, _Layer] = weakref.WeakKeyDictionary()

    def note(self, name: str, ranks: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        """One more group of this name; process_group is None on a rank outside it."""
        layers = self._open.setdefault(name, [])
        layer = next((one for one in layers if one.ranks.isdisjoint(ranks)), None)
        if layer is None:
            layer = _Layer()
            layers.append(layer)
        layer.groups.append(tuple(ranks))
        layer.ranks.update(ranks)
        if process_group is not None:
            self._layers[process_group] = layer

    def of(self, process_group: dist.ProcessGroup, world: int) -> Mesh | None:
        """The mesh of a group that was noted, each rank of the world in exactly one of its groups."""
        layer = self._layers.get(process_group)
        return None if layer is None else completed(layer.groups, world)

    def close(self) -> None:
        """What is noted from now on belongs to other meshes; process groups that layers still hold keep theirs."""
        self._open.clear()
