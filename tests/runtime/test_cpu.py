"""The cpu lane's device: dtypes, how workers start, memory figures, seeds, the end of a step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.lane import Lane

lane = CpuLane()
MIB = 1 << 20


@pytest.mark.parametrize(
    ("dtype", "yes"),
    [
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float64, True),
        (torch.float16, False),
        (torch.float8_e4m3fn, False),
        (torch.complex64, False),
        (torch.int32, False),
    ],
)
def test_dtypes_to_train_in(dtype: torch.dtype, yes: bool) -> None:
    assert lane.supports(dtype) is yes


STARTS = [  # what a script asks for, how it is done on the cpu lane
    ("spawn", "fork"),
    ("fork", "fork"),
    ("forkserver", "forkserver"),
]


@pytest.mark.parametrize("asked, done", STARTS)
def test_start_method(asked: str, done: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lane.start_method(asked) == done
    assert Lane.start_method(lane, asked) == asked, "a lane with a device does as asked"
    monkeypatch.delattr(os, "fork")
    assert lane.start_method(asked) == asked


def test_memory_follows_a_tensor_and_keeps_its_peak() -> None:
    lane.reset_peak_memory()
    before = lane.memory()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    during = lane.memory()
    assert 60 * MIB < during.allocated - before.allocated < 80 * MIB
    del held
    after = lane.memory()
    assert after.allocated < before.allocated + 10 * MIB
    assert after.peak >= during.peak - MIB
    lane.reset_peak_memory()
    assert lane.memory().peak < after.peak - 50 * MIB


def test_a_mapped_file_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * (32 * MIB))
    before = lane.memory()
    mapped = torch.from_file(str(path), shared=True, size=32 * MIB, dtype=torch.uint8)
    assert int(mapped.sum()) == 32 * MIB * ord("x")  # every page was read
    after = lane.memory()
    assert after.allocated - before.allocated < 8 * MIB
    assert after.reserved - before.reserved > 24 * MIB


def test_memory_is_ordered_and_fits_the_machine() -> None:
    figures = lane.memory()
    assert 0 < figures.allocated <= figures.reserved <= figures.peak < lane.total_memory()


def test_total_memory_heeds_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from nxdt_nemo.runtime import machine

    monkeypatch.setattr(machine, "text", lambda path: "1048576\n" if path.endswith("memory.max") else "")
    assert lane.total_memory() == MIB
    monkeypatch.setattr(machine, "text", lambda path: "max\n")
    assert lane.total_memory() > MIB


def test_seed_and_state() -> None:
    kept = lane.rng_state()
    try:
        lane.manual_seed(5)
        state = lane.rng_state()
        first = torch.rand(4)
        assert not torch.equal(torch.rand(4), first)
        lane.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(5)))
    finally:
        lane.set_rng_state(kept)


def test_device_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lane.device(3) == torch.device("cpu")
    assert lane.name_of_device()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    assert lane.device_count() == 7
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert lane.device_count() >= 1


def test_deferred_values_are_read_at_once_and_without_a_graph() -> None:
    seen: list[torch.Tensor] = []
    loss = torch.ones((), requires_grad=True) * 3
    lane.defer(lambda *values: seen.extend(values), loss, torch.zeros(2))
    assert [value.tolist() for value in seen] == [3.0, [0.0, 0.0]]
    assert not seen[0].requires_grad
    lane.step_boundary()
    lane.synchronize()
    assert len(seen) == 2
