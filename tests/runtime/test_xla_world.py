"""A world of ranks that one process stands for: groups without peers, collectives in the graph, what a rank may ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nxdt_nemo.audit.deadlock import mismatches
from nxdt_nemo.audit.hlo import Graph
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.traced import TRACED_ENV

pytestmark = pytest.mark.ranks
WORLD = 8


@pytest.fixture(scope="module")
def alone(with_torch_xla: None) -> Iterator[Callable[..., Any]]:
    """alone(function, *args), in a process on the xla lane without ranks."""
    with RankPool(1, env=TRACED_ENV, init="nxdt_nemo:activate", group=False, timeout=300) as pool:
        yield lambda function, *args: pool.run(function, *args)[0]


def _lowered(rank: int) -> list[str]:
    import torch

    from nxdt_nemo.runtime import collectives, current
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.world import Recorder, pretend

    lane: Any = current()
    recorder = Recorder()
    with pretend(lane, rank, WORLD, Replicas(), recorder.cut):
        group = lane.groups([[0, 2], [1, 3], [4, 6], [5, 7]], "pairs")
        x = torch.ones(4, 6, device=lane.device())
        kept = [
            collectives.all_reduce(x, group),
            collectives.gather(x, 1, group),
            collectives.reduce_scatter(x, 0, group),
            collectives.scatter(x, 0, group),
            collectives.broadcast_(x.clone(), 1, group),
            collectives.all_to_all(x, group),
            collectives.ring(x, group),
        ]
        lane.step_boundary()
        del kept
    return recorder.graphs


def test_every_rank_lowers_one_program_with_the_whole_worlds_groups(alone: Callable[..., Any]) -> None:
    texts = [alone(_lowered, rank) for rank in (0, 3, 7)]
    graphs = [Graph(text) for [text] in texts]
    assert len({graph.digest for graph in graphs}) == 1
    groups = ((0, 2), (1, 3), (4, 6), (5, 7))
    kinds = [one.kind for one in graphs[0].collectives]
    assert sorted(kinds) == sorted(
        ["all-reduce", "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
    )
    assert all(one.groups == groups for one in graphs[0].collectives if one.kind != "collective-permute")
    [permuted] = [one for one in graphs[0].collectives if one.kind == "collective-permute"]
    assert sorted(permuted.groups) == sorted((a, b) for pair in groups for a, b in (pair, pair[::-1]))


def _asks(what: str) -> str:
    import torch
    import torch.distributed as dist

    from nxdt_nemo.errors import LaneError
    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.world import pretend

    lane: Any = current()
    try:
        with pretend(lane, 0, WORLD, Replicas(), lambda: None):
            if what == "barrier":
                dist.barrier()
            elif what == "sum on the host":
                dist.all_reduce(torch.ones(1))
            elif what == "ragged":
                group = lane.groups([[*range(WORLD)]], "all")
                group.ops.all_to_all(torch.ones(9, 2, device=lane.device()), group, [2, *[1] * 7], [2, *[1] * 7])
    except LaneError as error:
        return str(error)
    return ""


def test_it_waits_for_nobody_and_makes_no_numbers_up(alone: Callable[..., Any]) -> None:
    assert alone(_asks, "barrier") == ""
    assert "needs the other ranks" in alone(_asks, "sum on the host")
    assert "no fixed shape" in alone(_asks, "ragged")


def _exchanged() -> list[list[float]]:
    """What two neighbours get that send twice and receive twice, each in the order of its own calls."""
    import torch

    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.world import pretend

    lane: Any = current()

    class Both(Replicas):
        """All-gathers of two ranks that run one after the other: what the first gave, then what the second gave."""

        def __init__(self, answers: list[torch.Tensor]) -> None:
            super().__init__()
            self.given: list[torch.Tensor] = []
            self.answers = iter(answers)

        def all_gather(self, x: torch.Tensor, dim: int, groups: list[list[int]]) -> torch.Tensor:
            self.given.append(x)
            return next(self.answers, torch.cat([x, x], dim))

    def run(rank: int, answers: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        dialect = Both(answers)
        with pretend(lane, rank, 2, dialect, lambda: None):
            group = lane.groups([[0, 1]], "pp")
            sends = [(torch.full((1,), value + rank, device=lane.device()), 1 - rank) for value in (10.0, 20.0)]
            receives = [((1,), torch.float32, 1 - rank)] * 2
            return dialect.given, group.ops.exchange(sends, receives, group).wait()

    given = [run(rank, [])[0] for rank in (0, 1)]
    answers = [torch.cat(pair) for pair in zip(*given, strict=True)]
    return [[float(one) for one in run(rank, answers)[1]] for rank in (0, 1)]


def test_neighbours_that_send_before_they_receive_get_each_others(alone: Callable[..., Any]) -> None:
    assert alone(_exchanged) == [[11.0, 21.0], [10.0, 20.0]]


def _stage(rank: int, trains: bool) -> list[str]:
    """What a stage of two lowers that keeps nothing of its own: a forward pass, and a backward one if it trains."""
    import torch

    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.world import Recorder, pretend

    lane: Any = current()
    recorder = Recorder()
    with pretend(lane, rank, 2, Replicas(), recorder.cut):
        group = lane.groups([[0, 1]], "pp")
        x = torch.ones(4, device=lane.device())
        lane.cut()  # x is there before
        recorder.forget()
        there = [((4,), torch.float32, 1 - rank)]
        kept = []
        for _ in range(2):
            received = [] if rank == 0 else group.ops.exchange([], there, group).wait()
            if rank == 0:
                group.ops.exchange([(x * 2, 1)], [], group).wait()
                kept += group.ops.exchange([], there, group).wait() if trains else []
            elif trains:
                group.ops.exchange([(received[0] * 3, 0)], [], group).wait()
            else:
                kept += received
        del received
        lane.cut()
        del kept
    return recorder.graphs


@pytest.mark.parametrize("trains", [False, True])
def test_what_a_stage_sends_is_in_its_graph_though_nothing_follows(alone: Callable[..., Any], trains: bool) -> None:
    """A validation's first stage has no loss, and a last one without clipping no norm."""
    found = {rank: [one for text in alone(_stage, rank, trains) for one in Graph(text).collectives] for rank in (0, 1)}
    assert [len(collectives) for collectives in found.values()] == ([4, 4] if trains else [2, 2])
    assert not [*mismatches(found)]


def _between(rank: int, world: int, mesh: list[list[int]], peer: int) -> Any:
    """The replica groups of a transfer with the rank in that place of the pipeline, or why there are none."""
    import torch

    from nxdt_nemo.errors import LaneError
    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.world import Recorder, pretend

    lane: Any = current()
    recorder = Recorder()
    with pretend(lane, rank, world, Replicas(), recorder.cut):
        group = lane.groups(mesh, "pp")
        try:
            group.ops.exchange([(torch.ones(2, device=lane.device()), peer)], [], group)
        except LaneError as error:
            return error.reason
        lane.cut()
    [found] = [one.groups for text in recorder.graphs for one in Graph(text).collectives]
    return found


FOUR, THREE = [[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 2, 4], [1, 3, 5]]
TRANSFERS: list[tuple[int, int, list[list[int]], int, Any]] = [
    (0, 8, FOUR, 1, ((0, 2), (4, 6), (1, 3), (5, 7))),
    (4, 8, FOUR, 3, ((0, 2), (4, 6), (1, 3), (5, 7))),
    (2, 8, FOUR, 2, ((2, 4), (0, 6), (3, 5), (1, 7))),
    (6, 8, FOUR, 0, ((0, 6), (2, 4), (1, 7), (3, 5))),
    (0, 8, FOUR, 2, ((0, 4), (1, 5), (2, 3), (6, 7))),  # no neighbours
    (2, 6, THREE, 2, ((2, 4), (3, 5), (0, 1))),
    (0, 3, [[0, 1, 2]], 1, "groups of 2, and the world's other 1 ranks make no"),
]


@pytest.mark.parametrize(("rank", "world", "mesh", "peer", "expected"), TRANSFERS)
def test_a_transfers_replica_groups_cover_the_world(
    alone: Callable[..., Any], rank: int, world: int, mesh: list[list[int]], peer: int, expected: Any
) -> None:
    found = alone(_between, rank, world, mesh, peer)
    assert expected in found if isinstance(expected, str) else sorted(found) == sorted(expected)


def _own_group(world: int) -> Any:
    """The replica groups of a sum and a gathering in a group that a script made of ranks 0 and 1."""
    import torch
    import torch.distributed as dist

    from nxdt_nemo.errors import LaneError
    from nxdt_nemo.runtime import current
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.world import Recorder, pretend

    lane: Any = current()
    recorder = Recorder()
    with pretend(lane, 0, world, Replicas(), recorder.cut):
        group = dist.new_group([0, 1])
        x = torch.ones(2, device=lane.device())
        dist.all_reduce(x, group=group)
        whole = torch.empty(4, device=lane.device())
        try:
            dist.all_gather_into_tensor(whole, x, group=group)
        except LaneError as error:
            return error.reason
        lane.cut()
    return [one.groups for text in recorder.graphs for one in Graph(text).collectives]


def test_a_group_of_a_scripts_own_covers_the_world(alone: Callable[..., Any]) -> None:
    assert alone(_own_group, 4) == [((0, 1), (2,), (3,)), ((0, 1), (2, 3))]
    assert "groups of 2, and the world's other 3 ranks make no" in alone(_own_group, 5)
