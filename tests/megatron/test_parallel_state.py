"""Meshes of a whole world: by arithmetic, of upstream's own groups, and under a placement."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from nxdt_nemo.errors import LayoutError
from nxdt_nemo.megatron.parallel_state import DESCRIPTIONS, LEFT, LEVEL, meshes
from nxdt_nemo.runtime.groups import Mesh, Meshes, checked_mesh, completed
from nxdt_nemo.runtime.placement import Placement
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, Part, assemble, forget_groups, train
from nxdt_nemo.testing.pool import function_name
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout, Recipe
from nxdt_nemo.testing.reference import STOCK_ENV, initial_weights

TP_PP_DP = "tp-cp-ep-pp-dp"  # NeMo's use_tp_pp_dp_mapping

# --- arithmetic, against tables written by hand ---------------------------------------------------------------------

TABLES: list[tuple[int, dict[str, Any], dict[str, Mesh]]] = [
    (
        8,
        {"tp": 2, "pp": 2},
        {
            "tp": ((0, 1), (2, 3), (4, 5), (6, 7)),
            "pp": ((0, 4), (1, 5), (2, 6), (3, 7)),
            "dp": ((0, 2), (1, 3), (4, 6), (5, 7)),
            "tp-pp": ((0, 1, 4, 5), (2, 3, 6, 7)),
            "tp-dp": ((0, 1, 2, 3), (4, 5, 6, 7)),
            "embedding": ((0, 4), (1, 5), (2, 6), (3, 7)),
            "position-embedding": ((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,)),
            "optimizer-instance": ((0, 1, 2, 3, 4, 5, 6, 7),),
        },
    ),
    (
        8,
        {"tp": 2, "pp": 2, "order": TP_PP_DP},
        {
            "tp": ((0, 1), (2, 3), (4, 5), (6, 7)),
            "pp": ((0, 2), (1, 3), (4, 6), (5, 7)),
            "dp": ((0, 4), (1, 5), (2, 6), (3, 7)),
            "tp-pp": ((0, 1, 2, 3), (4, 5, 6, 7)),
        },
    ),
    (4, {"pp": 4}, {"embedding": ((0, 3), (1,), (2,)), "position-embedding": ((0,), (1,), (2,), (3,))}),
    (
        8,
        {"tp": 2, "cp": 2},
        {
            "cp": ((0, 2), (1, 3), (4, 6), (5, 7)),
            "dp": ((0, 4), (1, 5), (2, 6), (3, 7)),
            "tp-cp": ((0, 1, 2, 3), (4, 5, 6, 7)),
            "dp-cp": ((0, 2, 4, 6), (1, 3, 5, 7)),
            "expert-dp": ((0, 2, 4, 6), (1, 3, 5, 7)),
        },
    ),
    (
        8,
        {"tp": 2, "ep": 2, "instances": 2},
        {
            "ep": ((0, 2), (1, 3), (4, 6), (5, 7)),
            "expert-tp": ((0, 1), (2, 3), (4, 5), (6, 7)),
            "expert-tp-ep": ((0, 1, 2, 3), (4, 5, 6, 7)),
            "expert-dp": ((0, 4), (1, 5), (2, 6), (3, 7)),
            "within-instance-dp-cp": ((0, 2), (4, 6), (1, 3), (5, 7)),
            "within-instance-expert-dp": ((0,), (4,), (1,), (5,), (2,), (6,), (3,), (7,)),
            "across-instances-expert-dp": ((0, 4), (1, 5), (2, 6), (3, 7)),
            "optimizer-instance": ((0, 1, 2, 3), (4, 5, 6, 7)),
        },
    ),
    (
        8,
        {"tp": 2, "ep": 4, "etp": 1},
        {"ep": ((0, 1, 2, 3), (4, 5, 6, 7)), "expert-dp": ((0, 4), (1, 5), (2, 6), (3, 7))},
    ),
    (
        8,
        {"cp": 4, "tp": 2, "hierarchical_cp": (2, 2)},
        {
            "cp": ((0, 2, 4, 6), (1, 3, 5, 7)),
            "cp-L0": ((0, 2), (4, 6), (1, 3), (5, 7)),
            "cp-L1": ((0, 4), (2, 6), (1, 5), (3, 7)),
        },
    ),
    (4, {"tp": 2, "order": "dp-tp"}, {"dp": ((0, 1), (2, 3)), "tp": ((0, 2), (1, 3))}),
]


@pytest.mark.parametrize(("world", "sizes", "expected"), TABLES)
def test_meshes(world: int, sizes: dict[str, Any], expected: dict[str, Mesh]) -> None:
    found = meshes(world, **sizes)
    assert {kind: found[kind] for kind in expected} == expected


def test_every_mesh_divides_the_world() -> None:
    found = meshes(64, tp=2, pp=4, cp=2, ep=4, etp=1, instances=2, hierarchical_cp=(2, 1))
    assert found.keys() == DESCRIPTIONS.keys() | {"cp-L0", "cp-L1"}
    for kind, mesh in found.items():
        assert checked_mesh(mesh, 64, kind) == mesh


REFUSED = [
    (6, {"tp": 4}, "tp 4 x pp 1 x cp 1 does not divide a world of 6 ranks"),
    (8, {"ep": 16}, "etp 1 x ep 16 x pp 1 does not divide a world of 8 ranks"),
    (8, {"tp": 2, "order": "dp-pp"}, "order=dp-pp does not say where tp 2 goes"),
    (8, {"order": "tp-xp"}, "order=tp-xp is not some of tp, pp, dp, ep, cp, each once, joined by -"),
    (8, {"order": "tp-tp"}, "order=tp-tp is not some of"),
    (8, {"instances": 3}, "num_distributed_optimizer_instances=3 does not divide data parallel 8"),
    (8, {"cp": 4, "hierarchical_cp": (2, 4)}, "the levels [2, 4] do not make up a group of 4 ranks"),
    (16, {"pp": 2, "cp": 2, "order": TP_PP_DP}, "with pp 2 needs experts (tp 1, ep 1, dp 8) to be divided as the rest"),
    (16, {"pp": 2, "cp": 2, "order": "dp-cp-pp-tp"}, "put pp last"),
]


@pytest.mark.parametrize(("world", "sizes", "text"), REFUSED)
def test_a_layout_that_cannot_be(world: int, sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(LayoutError) as error:
        meshes(world, **sizes)
    assert text in str(error.value)


def test_groups_of_one_name_that_share_a_rank_are_of_different_meshes() -> None:
    book = Meshes()
    keys: list[Any] = [Key() for _ in range(4)]
    for key, ranks in zip(keys, [(0, 2), (0, 3), (1, 4), (1, 5)], strict=True):  # upstream's encoder of one rank
        book.note("pp", ranks, key)
    assert book.of(keys[0], 6) == book.of(keys[2], 6) == ((0, 2), (1, 4), (3,), (5,))
    assert book.of(keys[1], 6) == book.of(keys[3], 6) == ((0, 3), (1, 5), (2,), (4,))
    book.close()
    book.note("pp", (0, 1), late := Key())  # type: ignore[arg-type]
    assert book.of(late, 2) == ((0, 1),)  # type: ignore[arg-type]
    assert book.of(keys[0], 6) == ((0, 2), (1, 4), (3,), (5,))
    assert book.of(Key(), 6) is None  # type: ignore[arg-type]


class Key:
    """In place of a process group."""


# --- against upstream, one process ----------------------------------------------------------------------------------

SIZES: list[tuple[int, dict[str, Any]]] = [
    (24, {"tp": 2, "pp": 3}),
    (16, {"tp": 2, "pp": 2, "cp": 2}),
    (16, {"tp": 2, "pp": 2, "ep": 4}),
    (24, {"tp": 2, "pp": 3, "ep": 2, "etp": 1}),
    (32, {"tp": 4, "pp": 2, "cp": 2, "ep": 4}),
]
DENSE = ("tp", "pp", "dp", "cp", "tp-pp", "tp-cp", "tp-dp", "tp-dp-cp", "dp-cp")
EXPERT = {"ep": "ep", "expert-tp": "tp", "expert-tp-ep": "tp-ep", "expert-tp-ep-pp": "tp-ep-pp", "expert-dp": "dp"}


def generated(order: str, world: int, sizes: dict[str, Any]) -> dict[str, Mesh] | None:
    """What upstream's RankGenerators say; None where initialize_model_parallel refuses."""
    from megatron.core.parallel_state import RankGenerator

    tp, pp, cp, ep = (sizes.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
    etp = sizes.get("etp") or tp
    dp, expert_dp = world // (tp * pp * cp), world // (etp * pp * ep)
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=expert_dp, pp=pp, cp=1, order=order)
    pp_last = order.lower().endswith("pp") or pp == 1 or dp == expert_dp
    if not pp_last or dense.get_ranks("pp") != expert.get_ranks("pp"):
        return None
    found = {kind: dense.get_ranks(kind) for kind in DENSE}
    found |= {kind: expert.get_ranks(token) for kind, token in EXPERT.items()}
    return {kind: tuple(map(tuple, mesh)) for kind, mesh in found.items()}


def compared() -> tuple[int, int, list[str]]:
    """How many orders and sizes agreed, how many both refuse, and where they differ."""
    agreed, refused, wrong = 0, 0, []
    orders = ["-".join(names) for names in itertools.permutations(("tp", "cp", "ep", "dp", "pp"))]
    for order, (world, sizes) in itertools.product([*orders, "TP-CP-EP-DP-PP"], SIZES):
        theirs = generated(order, world, sizes)
        try:
            ours = meshes(world, order=order, **sizes)
        except LayoutError:
            refused += theirs is None
            wrong += [] if theirs is None else [f"{order} {sizes}: ours refuses"]
            continue
        differ = "all" if theirs is None else [kind for kind in theirs if ours[kind] != theirs[kind]]
        agreed += not differ
        wrong += [f"{order} {sizes}: {differ}"] if differ else []
    return agreed, refused, wrong


def test_meshes_are_upstreams_in_every_order(active: Any) -> None:
    agreed, refused, wrong = active(compared)
    assert wrong == []
    assert agreed > 250 and refused > 200 and agreed + refused == 121 * len(SIZES)


# --- of upstream's groups, on real ranks ----------------------------------------------------------------------------

Seen = list[tuple[str, tuple[int, ...], Mesh]]


def initialized(sizes: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        sizes.get("tp", 1),
        sizes.get("pp", 1),
        context_parallel_size=sizes.get("cp", 1),
        hierarchical_context_parallel_sizes=list(sizes.get("hierarchical_cp", ())) or None,
        expert_model_parallel_size=sizes.get("ep", 1),
        expert_tensor_parallel_size=sizes.get("etp"),
        num_distributed_optimizer_instances=sizes.get("instances", 1),
        order=sizes.get("order", "tp-cp-ep-dp-pp"),
        create_gloo_process_groups=False,
    )


def destroyed() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    forget_groups()


def groups_seen(sizes: dict[str, Any]) -> Seen:
    """Of each process group that this rank is in: its name, torch's list of its ranks and the lane's mesh."""
    import torch.distributed as dist

    from nxdt_nemo.runtime import current

    lane = current()
    forget_groups()  # of another test in this pool
    initialized(sizes)
    try:
        groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
        return [
            (group.group_desc, tuple(dist.get_process_group_ranks(group)), lane.group_of(group).mesh)
            for group in groups
        ]
    finally:
        destroyed()


RUNS: list[tuple[int, dict[str, Any]]] = [
    (4, {"tp": 2, "pp": 2}),
    (4, {"pp": 4}),
    (4, {"tp": 2, "cp": 2, "order": "cp-tp-ep-dp-pp"}),
    (4, {"order": "dp-tp", "tp": 2}),
    (4, {"cp": 4, "hierarchical_cp": (2, 2)}),
    (4, {"ep": 2, "instances": 2}),
    (8, {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "order": TP_PP_DP}),
    (8, {"tp": 2, "ep": 2, "cp": 2, "instances": 2}),
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "sizes"), [run if run[0] == 4 else pytest.param(*run, marks=pytest.mark.slow) for run in RUNS]
)
def test_each_group_of_upstreams_knows_its_whole_mesh(gloo: Gloo, world: int, sizes: dict[str, Any]) -> None:
    expected = meshes(world, **sizes)
    names = DESCRIPTIONS | {f"cp-L{level}": LEVEL.format(level) for level in (0, 1)}
    by_name = {names[kind]: mesh for kind, mesh in expected.items()}
    met = set()
    for rank, seen in enumerate(gloo(world, groups_seen, sizes, init=ACTIVE, env=ACTIVE_ENV)):
        for name, ranks, mesh in seen:
            assert rank in ranks and ranks in mesh, name
            assert checked_mesh(mesh, world, name) == mesh == by_name[name], name
            met.add(name)
    assert met == by_name.keys()


def anew() -> list[Any]:
    """The mesh of a group of one layout, before and after another has taken its place; upstream's leftovers."""
    from megatron.core import parallel_state

    from nxdt_nemo.runtime import current

    forget_groups()  # of another test in this pool
    initialized({"pp": 4, "hierarchical_cp": (1,)})
    first = parallel_state.get_pipeline_model_parallel_group()
    embedded = parallel_state.is_rank_in_embedding_group(ignore_virtual=True)
    parallel_state.destroy_model_parallel()
    left = parallel_state.is_rank_in_embedding_group(ignore_virtual=True)
    states = [vars(parallel_state)[name] for name in LEFT]
    initialized({"pp": 2})
    second = parallel_state.get_pipeline_model_parallel_group()
    found = [current().group_of(group).mesh for group in (first, second)]
    destroyed()
    return [*found, embedded, left, states]


@pytest.mark.ranks
def test_a_layout_after_another(gloo: Gloo) -> None:
    for rank, found in enumerate(gloo(4, anew, init=ACTIVE, env=ACTIVE_ENV)):
        assert found == [((0, 1, 2, 3),), ((0, 2), (1, 3)), rank in (0, 3), False, [None, None, None]]


# --- under a placement ----------------------------------------------------------------------------------------------

# A trn2 node in small: four rows of one rank each. Group 0 of tensor parallelism is the first row and the last, so
# that the second member of each pipeline starts on rank 3 and goes on, downwards, on rank 2.
ROWS = Placement("trn2", (0, 3, 1, 2))
PLACED_ENV = {**ACTIVE_ENV, "NXDT_NEMO_PLACEMENT": "trn2"}
RECIPE = Recipe.of("gpt", layers=2, steps=3, micro_batches=2)


def in_rows() -> None:
    """Each rank's parallel state is placed as ROWS says, whatever the layout."""
    import nxdt_nemo
    from nxdt_nemo.megatron import parallel_state

    parallel_state.from_environment = lambda sizes: ROWS  # type: ignore[assignment]
    nxdt_nemo.activate()


def in_rows_sorted() -> None:
    """The mistake: torch orders a group's ranks."""
    from nxdt_nemo.runtime import ordered

    make = ordered.new_group
    ordered.new_group = lambda ranks, **named: make(sorted(ranks), **named)  # type: ignore[assignment]
    in_rows()


def own_places() -> tuple[int, ...]:
    from megatron.core import parallel_state as state

    initialized({"tp": 2, "pp": 2})
    ring = state.get_pipeline_model_parallel_group()
    found = (
        state.get_tensor_model_parallel_rank(),
        state.get_pipeline_model_parallel_rank(),
        state.get_pipeline_model_parallel_next_rank(),
        state.get_tensor_model_parallel_src_rank(),
        ring.rank(),
    )
    destroyed()
    return found


@pytest.mark.ranks
def test_placed_ranks_keep_their_order_in_each_group(gloo: Gloo) -> None:
    """Logical ranks 0 1 2 3 of tp2 pp2 are the physical 0 3 1 2."""
    found = gloo(4, own_places, init=function_name(in_rows), env=PLACED_ENV)
    #         tp pp next first-of-tp pp
    expected = [(0, 0, 1, 0, 0), (0, 1, 0, 1, 1), (1, 1, 3, 1, 1), (1, 0, 2, 0, 0)]
    assert found == expected


def trained(weights: dict[str, Any], layout: Layout) -> Part:
    part = train(RECIPE, weights, layout)
    destroyed()
    return part


@pytest.mark.ranks
def test_a_placed_layout_trains_as_an_ascending_one(gloo: Gloo) -> None:
    """To the bit: the groups are the same ones, of other ranks."""
    [weights] = gloo(1, initial_weights, RECIPE, env=STOCK_ENV)
    layout = Layout(tp=2, pp=2)
    plain, _ = assemble(gloo(4, trained, weights, layout, init=ACTIVE, env=ACTIVE_ENV))
    placed, _ = assemble(gloo(4, trained, weights, layout, init=function_name(in_rows), env=PLACED_ENV))
    assert placed.losses == plain.losses and placed.grad_norms == plain.grad_norms
    for name, gradient in plain.grads.items():
        assert (placed.grads[name] == gradient).all(), name


def mixed_with() -> tuple[tuple[int, ...], int, Mesh]:
    """This rank's group for the mixing of tokens: its members, its own place, its mesh."""
    from megatron.core import parallel_state as state

    from nxdt_nemo.megatron.transformer.moe.token_shuffle import shuffle_group

    initialized({"tp": 2})
    group = shuffle_group(SimpleNamespace(token_shuffle_group_size=2, moe_router_load_balancing_type="none"))
    assert group is not None and group.rank == state.get_data_parallel_rank()
    destroyed()
    return group.ranks, group.rank, group.mesh


@pytest.mark.ranks
def test_placed_ranks_mix_their_tokens_in_their_order(gloo: Gloo) -> None:
    """The data-parallel group of the logical ranks 1 and 3 is [3, 2]."""
    mesh = ((0, 1), (3, 2))
    expected = [((0, 1), 0, mesh), ((0, 1), 1, mesh), ((3, 2), 1, mesh), ((3, 2), 0, mesh)]
    assert gloo(4, mixed_with, init=function_name(in_rows), env=PLACED_ENV) == expected


@pytest.mark.ranks
def test_sorted_ranks_would_be_seen(gloo: Gloo) -> None:
    found = gloo(4, own_places, init=function_name(in_rows_sorted), env=PLACED_ENV)
    assert [places[:2] for places in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]  # ranks 2 and 3 have changed stages


def test_ranks_that_are_in_no_group_have_their_own() -> None:
    assert completed([(0, 3)], 5) == ((0, 3), (1,), (2,), (4,))
