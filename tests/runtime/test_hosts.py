"""Flags and checkpoints go through host memory: which groups carry it, and one that always does."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from nxdt_nemo.runtime.hosts import carries_host_memory, host_world


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch.distributed puts its own there
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_world_of_hosts_is_taken_as_it_is(alone: dist.ProcessGroup) -> None:
    assert carries_host_memory(alone)
    assert host_world() is alone


def test_beside_another_world_a_group_is_made(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dist.get_backend
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "xla" if group is alone else real(group))
    assert not carries_host_memory(alone)
    made = host_world()
    assert made is not alone
    flag = torch.ones(1)
    dist.broadcast(flag, 0, group=made)
    assert flag.item() == 1.0


def test_without_ranks_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="the ranks are not up"):
        host_world()
