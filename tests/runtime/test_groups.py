"""Bring-up of ranks, and groups given as the list of all groups of the world."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.groups import checked_mesh

Run = Callable[..., list[Any]]
MESHES = [
    ([[0, 1], []], "an empty group"),
    ([[0, 1], [1, 2, 3]], "ranks [1] are listed more than once"),
    ([[0, 1], [2, 3, 4]], "ranks [4] are not in a world of 4"),
    ([[0, 1], [-1, 2, 3]], "ranks [-1] are not in a world of 4"),
    ([[0, 1], [3, 2]], "ranks [3, 2] are not ascending, and torch sorts"),
    ([[0, 3]], "ranks [1, 2] are in no group"),
]


@pytest.mark.parametrize(("mesh", "text"), MESHES)
def test_a_wrong_mesh_says_what_is_wrong(mesh: list[list[int]], text: str) -> None:
    with pytest.raises(ValueError) as error:
        checked_mesh(mesh, 4, "tp")
    assert "mesh of group tp" in str(error.value)
    assert text in str(error.value)


def test_a_mesh_may_have_unequal_sizes() -> None:
    assert checked_mesh([[0, 3], [2], [1]], 4, "embedding") == ((0, 3), (2,), (1,))


def described(lane: CpuLane) -> list[Any]:
    pairs = lane.groups([[0, 2], [1, 3]], "tp")
    world = lane.world()
    own = dist.new_group([1, 3])  # as upstream makes its own
    theirs = lane.group_of(own) if world.rank in (1, 3) else None
    return [
        (pairs.name, pairs.mesh, pairs.ranks, pairs.rank, pairs.size, dist.get_process_group_ranks(pairs.pg)),
        lane.group_of(pairs.pg) is pairs,
        (world.ranks, world.rank, world.mesh),
        (theirs.ranks, theirs.rank, theirs.mesh) if theirs else None,
        pairs.pg.group_desc,
        dist.get_backend(pairs.pg),
    ]


@pytest.mark.ranks
def test_groups(ranks: Run) -> None:
    whole = (0, 1, 2, 3)
    for rank, (pairs, same, world, theirs, label, backend) in enumerate(ranks(4, described)):
        mine = (0, 2) if rank in (0, 2) else (1, 3)
        assert pairs == ("tp", ((0, 2), (1, 3)), mine, mine.index(rank), 2, list(mine))
        assert same
        assert world == (whole, rank, (whole,))
        assert theirs == (((1, 3), (1, 3).index(rank), ((1, 3),)) if rank in (1, 3) else None)
        assert (label, backend) == ("tp", CpuLane.backend)


def asked_again(lane: CpuLane) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    lane.init_ranks(rank, world)
    said = []
    for wish in ((rank, world + 1), ((rank + 1) % world, world), (world, world)):
        try:
            lane.init_ranks(*wish)
            said.append("no error")
        except LaneError as error:
            said.append(str(error))
    return said


@pytest.mark.ranks
def test_ranks_that_are_up_are_taken_only_as_asked(ranks: Run) -> None:
    world, rank, outside = ranks(2, asked_again)[1]
    assert "is up with backend gloo, rank 1 of 2" in world
    assert "asked for backend gloo, rank 1 of 3" in world
    assert "asked for backend gloo, rank 0 of 2" in rank
    assert "rank 2 is not in a world of 2" in outside


def test_the_launcher_is_not_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LaneError) as error:
        CpuLane().init_ranks(0, 2)
    assert str(error.value) == "init_ranks: WORLD_SIZE=4 in the environment, but the caller says 2"
    assert not dist.is_initialized()


def test_a_group_needs_ranks() -> None:
    with pytest.raises(LaneError) as error:
        CpuLane().groups([[0]], "tp")
    assert "call init_ranks first" in error.value.fix


def test_one_rank_up_and_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch.distributed replaces it for good
    lane = CpuLane()
    lane.init_ranks(0, 1, init_method=f"file://{tmp_path}/store")
    try:
        assert lane.world().size == 1
        assert lane.groups([[0]], "tp").ranks == (0,)
    finally:
        lane.close_ranks()
    assert not dist.is_initialized()
    lane.close_ranks()  # nothing to close is no error
