"""Every group of the whole world: computed before there are ranks, and known of upstream's own groups.

Room megatron/. Beside megatron/core/parallel_state.py (core_v0.13.1), where a rank sees its own groups only; a traced
collective needs all of a dimension's. `meshes` is arithmetic; three wrapped functions of upstream note each group as
it is made, number the ranks as the placement says (runtime/placement.py) and forget what upstream leaves behind.
May import nxdt_nemo.runtime; torch only when a group is made. Proof: tests/megatron/test_parallel_state.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from typing import Any

from nxdt_nemo.errors import LayoutError
from nxdt_nemo.runtime import current
from nxdt_nemo.runtime.groups import Mesh, completed
from nxdt_nemo.runtime.placement import asked, from_environment

__all__ = ["DESCRIPTIONS", "create_group", "destroy_model_parallel", "get_ranks", "meshes"]

NAMES = ("tp", "pp", "dp", "ep", "cp")  # in the order in which upstream adds those that an order leaves out

# The name that upstream gives to each mesh's process groups. L0, L1: what hierarchical_cp has of levels.
DESCRIPTIONS = {
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "dp": "DATA_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "tp-pp": "MODEL_PARALLEL_GROUP",
    "tp-cp": "TENSOR_AND_CONTEXT_PARALLEL_GROUP",
    "tp-dp": "TENSOR_AND_DATA_PARALLEL_GROUP",
    "tp-dp-cp": "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
    "dp-cp": "DATA_PARALLEL_GROUP_WITH_CP",
    "embedding": "EMBEDDING_GROUP",
    "position-embedding": "POSITION_EMBEDDING_GROUP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
    "expert-tp": "EXPERT_TENSOR_PARALLEL_GROUP",
    "expert-tp-ep": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "expert-tp-ep-pp": "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",
    "expert-dp": "EXPERT_DATA_PARALLEL_GROUP",
    "optimizer-instance": "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP",
    # with several instances of the distributed optimizer
    "within-instance-dp-cp": "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP",
    "within-instance-expert-dp": "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L0",
    "across-instances-expert-dp": "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L1",
}
LEVEL = "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L{}"

# Set by initialize_model_parallel and left as they were by upstream's destroy_model_parallel. A stage of the next
# layout that has no embedding would take itself for one that has.
LEFT = ("_EMBEDDING_GLOBAL_RANKS", "_HIERARCHICAL_CONTEXT_PARALLEL_GROUPS", "_PIPELINE_MODEL_PARALLEL_SPLIT_RANK")


def meshes(
    world: int,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    order: str = "tp-cp-ep-dp-pp",
    instances: int = 1,
    hierarchical_cp: Sequence[int] = (),
) -> dict[str, Mesh]:
    """All groups that initialize_model_parallel makes of these sizes: the keys of DESCRIPTIONS, and "cp-L0", ...

    world            number of ranks; the data-parallel sizes follow from it
    etp              tensor parallelism of the experts; None: as tp
    order            the dimensions, inner to outer, in any order; one of size 1 may be left out
    instances        num_distributed_optimizer_instances
    hierarchical_cp  hierarchical_context_parallel_sizes, whose product is cp
    Each rank is in exactly one group of a mesh; a rank that upstream gives no group (no embedding) has its own.
    Ranks are logical: Placement.mesh numbers them as an instance does.
    Raises LayoutError naming what does not divide, or what the order leaves out.
    """
    etp = tp if etp is None else etp
    dp, expert_dp = _rest(world, tp=tp, pp=pp, cp=cp), _rest(world, etp=etp, ep=ep, pp=pp)
    dense = _ordered(order, {"tp": tp, "pp": pp, "dp": dp, "ep": 1, "cp": cp})
    expert = _ordered(order, {"tp": etp, "pp": pp, "dp": expert_dp, "ep": ep, "cp": 1})
    last = order.lower().endswith("pp") or pp == 1
    if (not last and dp != expert_dp) or _split(dense, {"pp"}) != _split(expert, {"pp"}):
        raise LayoutError(
            f"order={order} with pp {pp} needs experts (tp {etp}, ep {ep}, dp {expert_dp}) to be divided as the rest "
            f"is (tp {tp}, cp {cp}, dp {dp})",
            fix="put pp last",
        )
    found = {kind: _split(dense, set(kind.split("-"))) for kind in ("tp", "pp", "dp", "cp", "tp-pp", "tp-cp", "tp-dp")}
    found |= {kind: _split(dense, set(kind.split("-"))) for kind in ("tp-dp-cp", "dp-cp")}
    found["embedding"] = completed(((*ranks[:1], *ranks[1:][-1:]) for ranks in found["pp"]), world)
    found["position-embedding"] = completed((ranks[:1] for ranks in found["pp"]), world)
    found["ep"] = _split(expert, {"ep"})
    for kind in ("tp", "tp-ep", "tp-ep-pp", "dp"):
        found[f"expert-{kind}"] = _split(expert, set(kind.split("-")))
    found |= _instances(found, instances)
    found |= _levels(found["cp"], "cp-L{}", hierarchical_cp) if hierarchical_cp else {}
    return found


def _instances(found: dict[str, Mesh], instances: int) -> dict[str, Mesh]:
    """The meshes of a distributed optimizer that is divided into instances."""
    size, expert_size = len(found["dp-cp"][0]), len(found["expert-dp"][0])
    for name, whole in {"data": size, "expert data": expert_size}.items():
        if whole % instances:
            raise LayoutError(
                f"num_distributed_optimizer_instances={instances} does not divide {name} parallel {whole}"
            )
    part, models = expert_size // instances, found["expert-tp-ep-pp"]
    joined = (models[start : start + part] for start in range(0, len(models), part))
    result = {"optimizer-instance": tuple(tuple(sorted(rank for one in some for rank in one)) for some in joined)}
    if instances > 1:
        levels = _levels(found["expert-dp"], "{}", (part, instances))
        result |= {"within-instance-expert-dp": levels["0"], "across-instances-expert-dp": levels["1"]}
        result["within-instance-dp-cp"] = tuple(
            ranks[start : start + size // instances]
            for ranks in found["dp-cp"]
            for start in range(0, size, size // instances)
        )
    return result


def _levels(mesh: Mesh, name: str, sizes: Sequence[int]) -> dict[str, Mesh]:
    """Each group divided into a grid of these sizes, and its lines along each: neighbours in level 0."""
    if math.prod(sizes) != len(mesh[0]):
        raise LayoutError(f"the levels {list(sizes)} do not make up a group of {len(mesh[0])} ranks")
    grid = {str(level): size for level, size in enumerate(sizes)}
    lines = {name.format(level): _split(grid, {level}) for level in grid}
    return {key: tuple(tuple(ranks[i] for i in line) for ranks in mesh for line in one) for key, one in lines.items()}


def _rest(world: int, **sizes: int) -> int:
    rest, left = divmod(world, math.prod(sizes.values()))
    if left or not rest:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise LayoutError(f"{product} does not divide a world of {world} ranks")
    return rest


def _ordered(order: str, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, inner to outer."""
    given = order.lower().split("-")
    if set(given) - set(NAMES) or len(set(given)) < len(given):
        raise LayoutError(f"order={order} is not some of {', '.join(NAMES)}, each once, joined by -")
    missing = [name for name in NAMES if name not in given]
    unplaced = [f"{name} {sizes[name]}" for name in missing if sizes[name] > 1]
    if unplaced:
        raise LayoutError(f"order={order} does not say where {', '.join(unplaced)} goes")
    return {name: sizes[name] for name in (*given, *missing)}


def _split(sizes: dict[str, int], kind: Collection[str]) -> Mesh:
    """The ranks that differ in these dimensions only, of all of a grid; sizes inner to outer."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        outside = tuple(place for name, place in _places(rank, sizes) if name not in kind)
        groups.setdefault(outside, []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values())


def _places(rank: int, sizes: dict[str, int]) -> Iterator[tuple[str, int]]:
    for name, size in sizes.items():
        rank, place = divmod(rank, size)
        yield name, place


# --- of upstream's own groups ------------------------------------------------------------------------------------


def get_ranks(original: Callable[..., list[list[int]]], self: Any, token: str) -> list[list[int]]:
    """RankGenerator.get_ranks, its ranks numbered as NXDT_NEMO_PLACEMENT says. Raises LayoutError, see placement."""
    ranks = original(self, token)
    name = asked()
    if name == "ascending":
        return ranks
    if self.rank_offset:
        raise LayoutError(
            "an encoder with a layout of its own has no published placement",
            place=f"NXDT_NEMO_PLACEMENT={name}",
            fix="use NXDT_NEMO_PLACEMENT=ascending",
        )
    return from_environment(dict(zip(self.order.split("-"), self.ordered_size, strict=True))).mesh(ranks)


def create_group(
    original: Callable[..., Any],
    /,
    ranks: Sequence[int] | None = None,
    timeout: timedelta | None = None,
    backend: str | None = None,
    pg_options: Any = None,
    use_local_synchronization: bool = False,
    group_desc: str | None = None,
) -> Any:
    """Upstream's group, noted with the lane; under a placement its members keep the order given.

    Without one torch sorts them, as upstream means it: its lists of an optimizer's instances are not ascending.
    """
    import torch.distributed as dist

    members = list(range(dist.get_world_size())) if ranks is None else sorted(ranks)
    if ranks is not None and asked() != "ascending" and list(ranks) != members:
        from nxdt_nemo.runtime import ordered

        members = list(ranks)
        made = ordered.new_group(members, timeout=timeout, backend=backend, options=pg_options, name=group_desc)
    else:
        made = original(ranks, timeout, backend, pg_options, use_local_synchronization, group_desc)
    if not use_local_synchronization:  # else only its members would note it
        current().note_group(group_desc or "", members, made if isinstance(made, dist.ProcessGroup) else None)
    return made


def destroy_model_parallel(original: Callable[[], None]) -> None:
    """As upstream, and without what it leaves behind. The groups stay open: layers that were built hold them."""
    original()
    state = sys.modules["megatron.core.parallel_state"]
    for name in LEFT:
        setattr(state, name, None)
    current().close_meshes()
