"""Where the ranks of a Megatron layout sit on the devices of a Trainium instance, by name.

Room runtime/. Stands in for the replica-group logic of neuronx_distributed.parallel_layers.parallel_state
(initialize_model_parallel's case for TP 4 on trn1, ascending_descending_ring_PG_group, get_logic_chosen). Data and
arithmetic; imports the standard library and nxdt_nemo.errors. Enters where Megatron makes its lists of ranks
(megatron/parallel_state.py). Proof: tests/runtime/test_placement.py, against the published tables.

Megatron numbers ranks from 0 by its order of dimensions: those are logical ranks. A launcher numbers processes by
node and by device: those are physical ranks, torch's. A placement says which physical rank a logical one is; every
group keeps its members' logical order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nxdt_nemo.errors import LayoutError

__all__ = ["LNC", "NAMES", "VARIABLE", "Placement", "asked", "from_environment", "placement"]

VARIABLE = "NXDT_NEMO_PLACEMENT"
LNC = "NEURON_LOGICAL_NC_CONFIG"

# trn3 is in NxD Core's list of hardware and nowhere in its choice of groups: ascending ranks are what it takes there.
NAMES = ("ascending", "trn1", "trn2", "trn3")

TP, EP, DP, PP = "tensor_model_parallel_size", "expert_model_parallel_size", "data parallel size", "pipeline"
ORDER = ("tp", "cp", "ep", "dp", "pp")  # inner to outer: the only one that tables are published for

TRN1_NODE = 32
TRN2_NODE = {1: 128, 2: 64}  # by LNC, the number of cores that make one device
TRN2_ROWS = {1: 64, 2: 32}  # the TP size, by LNC, that ascending ranks have no ring for and pairs of rows have
TRN2_NO_RING = {1: 16, 2: 8}  # "Not Supported" in get_logic_chosen's list of layouts
TRN2_TAKES = {1: "4, 8, 32, 64 or 128", 2: "4, 16, 32 or 64"}


@dataclass(frozen=True)
class Placement:
    """One order of ranks, repeated in each node.

    name  of NAMES
    node  node[i] is the place in its node of the node's i-th logical rank; (0,) leaves all as they are
    """

    name: str = "ascending"
    node: tuple[int, ...] = (0,)

    def physical(self, rank: int) -> int:
        """The physical rank of a logical one."""
        node, place = divmod(rank, len(self.node))
        return node * len(self.node) + self.node[place]

    def mesh(self, logical: Iterable[Sequence[int]]) -> list[list[int]]:
        """Groups of logical ranks as groups of physical ones; the order of groups and members stays."""
        return [[self.physical(rank) for rank in ranks] for ranks in logical]


ASCENDING = Placement()


def asked() -> str:
    """The name that NXDT_NEMO_PLACEMENT gives, "ascending" by default. Raises LayoutError for an unknown one."""
    name = os.environ.get(VARIABLE) or "ascending"
    if name not in NAMES:
        raise LayoutError(f"{name!r} is not a placement", place=VARIABLE, fix=f"use {_or(NAMES)}")
    return name


def from_environment(sizes: Mapping[str, int]) -> Placement:
    """The placement that the environment asks for, at these sizes. See placement."""
    name = asked()
    if name == "ascending":
        return ASCENDING
    node = os.environ.get("LOCAL_WORLD_SIZE")
    return placement(name, sizes, lnc=_lnc(name), node=int(node) if node else None)


def placement(name: str, sizes: Mapping[str, int], *, lnc: int = 1, node: int | None = None) -> Placement:
    """How an instance places a layout; ascending wherever NxD Core takes that.

    name   of NAMES
    sizes  of the dimensions tp, cp, ep, dp and pp, inner to outer; their product is the world
    lnc    cores to a device, 1 or 2 (trn2)
    node   ranks of a node; by default the instance's, or the whole world where that is smaller
    Raises LayoutError where NxD Core has no table for the layout, or says that it does not work.
    """
    place = f"{VARIABLE}={name}"
    if name == "trn1" and sizes["tp"] == 4:
        return _trn1_ring(sizes, node, place)
    if name == "trn2":
        return _trn2_rows(sizes, lnc, node, place)
    return ASCENDING


def _trn1_ring(sizes: Mapping[str, int], node: int | None, place: str) -> Placement:
    """TP 4 takes every eighth of a node's 32 cores, [0, 8, 16, 24]: the ones that are linked directly."""
    tp, world = sizes["tp"], math.prod(sizes.values())
    _check_published(sizes, place)
    node = _node(node or min(TRN1_NODE, world), world, tp, place)
    beside = node // tp
    if sizes["dp"] % beside:  # NxD Core gives the groups of a node to data parallelism, before any other dimension
        raise LayoutError(
            f"{DP} {sizes['dp']} is not a multiple of the {beside} groups of {TP}=4 that a node of {node} ranks holds",
            place=place,
            fix=f"use another {TP}, or {VARIABLE}=ascending",
        )
    return Placement("trn1", tuple(member * beside + group for group in range(beside) for member in range(tp)))


def _trn2_rows(sizes: Mapping[str, int], lnc: int, node: int | None, place: str) -> Placement:
    """Half a node is its first and its last row of four devices, or the two between, so that each half is a ring."""
    tp, world = sizes["tp"], math.prod(sizes.values())
    if tp == TRN2_NO_RING[lnc]:
        raise LayoutError(
            f"{TP}={tp} has no ring on trn2 at LNC {lnc}: ranks 0 and {tp} are not linked",
            place=place,
            fix=f"use {TRN2_TAKES[lnc]}",
        )
    if tp != TRN2_ROWS[lnc] or (lnc == 2 and world < TRN2_NODE[2]):
        return ASCENDING
    _check_published(sizes, place)
    node = _node(node or min(TRN2_NODE[lnc], world), world, tp, place)
    if node // tp > 2:
        raise LayoutError(f"a node of {node} ranks is not one or two groups of {TP}={tp}", place=place)
    row = node // 4
    return Placement("trn2", tuple(which * row + column for which in (0, 3, 1, 2) for column in range(row)))


def _check_published(sizes: Mapping[str, int], place: str) -> None:
    """NxD Core: "TP=4 case not yet implemented for expert parallelism", "Expert Parallelism is not supported"."""
    if sizes["ep"] > 1:
        raise LayoutError(
            f"{EP}={sizes['ep']} has no published placement beside {TP}={sizes['tp']}",
            place=place,
            fix=f"use another {TP}, or {VARIABLE}=ascending",
        )
    used = [name for name, size in sizes.items() if size > 1]
    if used != [name for name in ORDER if name in used]:
        raise LayoutError(
            f"the order {'-'.join(used)} of dimensions has no published placement",
            place=place,
            fix=f"use the order {'-'.join(name for name in ORDER if name in used)}, or {VARIABLE}=ascending",
        )


def _node(node: int, world: int, tp: int, place: str) -> int:
    """`node`, if it divides the world and holds whole groups."""
    if world % node or node % tp or node % 4:
        raise LayoutError(
            f"{world} ranks in nodes of {node} are not whole nodes of whole groups of {TP}={tp}",
            place=place,
            fix=f"use whole nodes, or {VARIABLE}=ascending",
        )
    return node


def _lnc(name: str) -> int:
    """NEURON_LOGICAL_NC_CONFIG; where it says nothing, 2 on trn2 and 1 elsewhere, as the instances come."""
    said = os.environ.get(LNC) or ("2" if name == "trn2" else "1")
    if said not in ("1", "2"):
        raise LayoutError(f"{said!r} is not a number of cores to a device", place=LNC, fix="use 1 or 2")
    return int(said)


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
