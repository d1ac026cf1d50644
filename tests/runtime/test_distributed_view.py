"""torch.distributed as upstream sees it: NCCL and "cuda" mean the lane's; elements gather, whatever their shape."""

from __future__ import annotations

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
    monkeypatch.setattr(type(current()), "ranks_are_up", lambda lane: looked.append(lane.name))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: running)
    seen.init_process_group("nccl")
    assert looked == ["cpu"] * looks


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
