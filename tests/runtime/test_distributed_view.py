"""torch.distributed as upstream sees it: NCCL and "cuda" mean the lane's; elements gather, whatever their shape."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nxdt_nemo.patching.view import ModuleView
from nxdt_nemo.runtime import distributed_view as ours
from nxdt_nemo.runtime.select import current, forget, select
from nxdt_nemo.testing.pytest_plugin import Gloo


@pytest.fixture
def seen() -> Iterator[ModuleView]:
    select("cpu")
    yield ours.distributed_view()
    forget()


@pytest.mark.parametrize(
    "asked, given", [("nccl", "gloo"), ("NCCL", "gloo"), ("cpu:gloo,cuda:nccl", "gloo"), ("gloo", "gloo"), (None, None)]
)
def test_backends(seen: ModuleView, monkeypatch: pytest.MonkeyPatch, asked: Any, given: Any) -> None:
    calls: list[Any] = []
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, *args, **kwargs: calls.append((backend, kwargs)))
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout, backend, **kwargs: calls.append((ranks, backend)))
    seen.init_process_group(asked, rank=0, device_id=torch.device("cuda:0"))
    seen.new_group([0], backend=asked)
    assert calls == [(given, {"rank": 0}), ([0], given)]


@pytest.mark.parametrize(("running", "looks"), [("gloo", 1), ("mpi", 0)])
def test_the_lane_looks_at_ranks_that_a_script_brings_up(
    seen: ModuleView, monkeypatch: pytest.MonkeyPatch, running: str, looks: int
) -> None:
    looked: list[str] = []
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(type(current()), "ranks_are_up", lambda lane: looked.append(lane.name))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: running)
    seen.init_process_group("nccl")
    assert looked == ["cpu"] * looks


NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("given", "alone"),
    [({}, True), ({"WORLD_SIZE": "2"}, False), ({"MASTER_ADDR": "other", "MASTER_PORT": "1"}, False)],
)
def test_a_script_without_a_launcher_is_a_world_of_one(
    seen: ModuleView, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], alone: bool
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the call sets
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    seen.init_process_group("nccl")
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert found.keys() == set(NAMES) and found["WORLD_SIZE"] == "1" if alone else found == given


def test_transfers_are_torchs_own(seen: ModuleView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.distributed_c10d, "_group_or_default_group", lambda group: group)
    monkeypatch.setattr(dist.distributed_c10d, "_canonicalize_group_rank", lambda *_, **__: 1)
    x = torch.ones(2)
    sent, taken = seen.P2POp(seen.isend, x, 1), seen.P2POp(seen.irecv, x, 1)
    assert (sent.op, taken.op) == (dist.isend, dist.irecv)
    assert sent.tensor is not x and sent.tensor.data_ptr() == x.data_ptr() and taken.tensor is x


def test_the_rest_is_torchs(seen: ModuleView) -> None:
    assert seen.broadcast is dist.broadcast
    assert seen.ReduceOp is dist.ReduceOp
    assert isinstance(object(), seen.DeviceMesh) is False
    assert seen.device_mesh.DeviceMesh is seen.DeviceMesh


def on_a_rank() -> list[Any]:
    """What a rank of two finds; NCCL's names go in."""
    import torch.distributed as dist

    from nxdt_nemo.runtime import distributed_view as ours
    from nxdt_nemo.runtime.select import select

    select("cpu")
    seen = ours.distributed_view()
    meshes = [seen.init_device_mesh("cuda", (2,), mesh_dim_names=("dp",)), seen.DeviceMesh("cuda", [0, 1])]
    meshes.append(seen.device_mesh.DeviceMesh.from_group(dist.group.WORLD, "cuda"))
    mine = torch.arange(8.0).reshape(2, 4) + 10 * dist.get_rank()
    gathered = torch.empty(16)
    seen.all_gather_into_tensor(gathered, mine)
    try:
        dist.all_gather_into_tensor(torch.empty(16), mine)
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    kinds = [mesh.device_type for mesh in meshes if isinstance(mesh, seen.DeviceMesh)]
    return [kinds, gathered.tolist(), dist.get_backend(seen.new_group([0, 1], backend="nccl")), refused]


@pytest.mark.ranks
def test_on_ranks(gloo: Gloo) -> None:
    expected = [*range(8), *range(10, 18)]
    for kinds, gathered, backend, refused in gloo(2, on_a_rank):
        assert kinds == ["cpu"] * 3
        assert gathered == expected
        assert backend == "gloo"
        assert "invalid tensor size" in refused  # the day gloo counts elements too, ours can go
