"""Random states: there and back through a checkpoint's folder, and when a step's numbers are drawn again."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nxdt_nemo import console
from nxdt_nemo.lightning import rng
from nxdt_nemo.lightning.rng import RngSnapshot
from nxdt_nemo.runtime import current
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import lane_here

SEEDED = 3


@pytest.fixture(autouse=True)
def _cpu_lane(monkeypatch):
    from nxdt_nemo.runtime.select import forget

    monkeypatch.setenv("NXDT_NEMO_RUNTIME", "cpu")
    monkeypatch.setattr(console, "_said", set())
    forget()
    yield
    forget()


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[float]:
    """One number of each kind; gauss and normal keep half of a pair, which a state must hold too."""
    return [
        random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
        float(torch.rand(1)), float(torch.randn(1)),
    ]  # fmt: skip


def test_take_and_restore():
    seed(SEEDED)
    draw()
    snapshot = RngSnapshot.take()
    first = draw()
    assert draw() != first
    snapshot.restore()
    assert draw() == first
    snapshot.restore()  # what it holds was not used up
    assert draw() == first


def test_there_and_back_through_files(tmp_path):
    seed(SEEDED)
    draw()
    snapshots = []
    for rank in range(2):
        snapshots.append(RngSnapshot.take())
        snapshots[rank].save(tmp_path, rank, 2)
        draw()
    expected = []
    for snapshot in snapshots:
        snapshot.restore()
        expected.append(draw() + draw())
    assert expected[0] != expected[1]
    for rank in range(2):
        seed(99)
        loaded = RngSnapshot.load(tmp_path, rank, 2)
        assert loaded is not None
        loaded.restore()
        assert draw() + draw() == expected[rank]
    assert sorted(path.name for path in (tmp_path / "rng").iterdir()) == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]


def test_another_world_size_is_said_once_and_not_restored(tmp_path, capsys):
    RngSnapshot.take().save(tmp_path, 0, 2)
    assert RngSnapshot.load(tmp_path, 0, 1) is None
    assert RngSnapshot.load(tmp_path, 0, 1) is None
    assert RngSnapshot.load(tmp_path / "stock", 0, 1) is None
    lines = [line for line in capsys.readouterr().err.splitlines() if "dropout goes on from the seed" in line]
    assert len(lines) == 2
    assert "was saved by 2 ranks" in lines[0]
    assert "stock holds no random states" in lines[1]


def test_another_layout_of_as_many_ranks_is_not_restored(tmp_path, capsys, monkeypatch):
    def groups(**ranks: list[int]) -> None:
        monkeypatch.setattr(rng, "_groups", lambda: ranks)

    groups(tp=[0], pp=[0, 1])
    RngSnapshot.take().save(tmp_path, 0, 2)
    assert RngSnapshot.load(tmp_path, 0, 2) is not None
    groups(tp=[0, 1], pp=[0])
    assert RngSnapshot.load(tmp_path, 0, 2) is None
    assert "was saved in another layout: dropout goes on from the seed" in capsys.readouterr().err
    groups()
    RngSnapshot.take().save(tmp_path, 0, 2)  # as by a plain DDPStrategy
    assert RngSnapshot.load(tmp_path, 0, 2) is not None


def test_a_file_without_the_hosts_stream_is_read(tmp_path):
    """As older ones are."""
    seed(SEEDED)
    snapshot = RngSnapshot.take()
    expected = draw()
    replace(snapshot, host=None).save(tmp_path, 0, 1)
    loaded = RngSnapshot.load(tmp_path, 0, 1)
    assert loaded is not None and loaded.host is None
    loaded.restore()
    assert draw() == expected


# --- between lanes -----------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The lane gets a device with a stream of its own, as the xla lane's: {"state": where it stands}."""
    held = {"state": torch.tensor([SEEDED])}
    lane = type(current())
    monkeypatch.setattr(lane, "rng_state", lambda _: held["state"].clone())
    monkeypatch.setattr(lane, "set_rng_state", lambda _, state: held.update(state=state))
    return held


def test_the_hosts_stream_is_kept_beside_a_devices(device, tmp_path):
    seed(SEEDED)
    RngSnapshot.take().save(tmp_path, 0, 1)
    expected = draw()
    device["state"] = torch.tensor([99])
    loaded = RngSnapshot.load(tmp_path, 0, 1)
    assert loaded is not None
    loaded.restore()
    assert draw() == expected
    assert device["state"].tolist() == [SEEDED]


def test_another_devices_states_are_said_and_not_restored(request, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    RngSnapshot.take().save(ours, 0, 1)
    request.getfixturevalue("device")
    RngSnapshot.take().save(theirs, 0, 1)
    assert RngSnapshot.load(ours, 0, 1) is None
    assert RngSnapshot.load(theirs, 0, 1) is not None
    assert "ours was saved on another kind of device: dropout goes on from the seed" in capsys.readouterr().err


def both_streams() -> list[float]:
    """Of the host, and of the device."""
    return [*torch.rand(2).tolist(), *torch.rand(2, device=lane_here().device()).tolist()]


def on_a_device(folder: str) -> list[list[float]]:
    """Drawn after a snapshot, after its restoring, and after its restoring from a file."""
    both_streams()
    snapshot = RngSnapshot.take()
    snapshot.save(Path(folder), 0, 1)
    drawn = [both_streams()]
    for again in (snapshot, RngSnapshot.load(Path(folder), 0, 1)):
        assert again is not None
        again.restore()
        drawn.append(both_streams())
    return drawn


@pytest.mark.slow
@pytest.mark.ranks
def test_the_hosts_stream_is_one_of_its_own_beside_a_devices(on_xla, tmp_path):
    first, restored, loaded = on_xla(on_a_device, str(tmp_path))
    assert first == restored == loaded


def loads(folder: str) -> bool:
    lane_here()
    return RngSnapshot.load(Path(folder), 0, 1) is not None


@pytest.mark.slow
@pytest.mark.ranks
def test_another_lanes_states_are_said_and_not_restored(on_xla, tmp_path, capsys):
    ours, theirs = tmp_path / "cpu", tmp_path / "xla"
    for folder in (ours, theirs):
        folder.mkdir()
    RngSnapshot.take().save(ours, 0, 1)
    on_xla(on_a_device, str(theirs))
    assert [on_xla(loads, str(folder)) for folder in (ours, theirs)] == [False, True]
    assert [RngSnapshot.load(folder, 0, 1) is None for folder in (ours, theirs)] == [False, True]
    assert "xla was saved on another kind of device: dropout goes on from the seed" in capsys.readouterr().err


# --- in a layout -------------------------------------------------------------------------------------------


def placed() -> list[Any]:
    """This rank's groups before Megatron has any, with PP 2 and with TP 2."""
    from megatron.core import parallel_state

    from nxdt_nemo.testing.ours import forget_groups

    found = [rng._groups()]
    for sizes in ((1, 2), (2, 1)):
        parallel_state.initialize_model_parallel(*sizes)
        found.append(rng._groups())
        forget_groups()
    return found


@pytest.mark.ranks
def test_the_groups_say_the_layout(gloo):
    for rank, (none, stages, tensors) in enumerate(gloo(2, placed, init=ACTIVE, env=ACTIVE_ENV)):
        alone = [rank]
        assert none == {}
        assert stages == {"tp": alone, "pp": [0, 1], "cp": alone, "ep": alone, "dp": alone}
        assert tensors == {"tp": [0, 1], "pp": alone, "cp": alone, "ep": alone, "dp": alone}


def with_a_tracker(folder: str) -> list[Any]:
    from megatron.core.tensor_parallel import random as tracked

    tracked.initialize_rng_tracker(force_reset=True)
    tracker = tracked.get_cuda_rng_tracker()
    tracker.add("tensor-parallel", 21)
    tracker.add("expert.parallel", 22)

    def numbers() -> list[float]:
        found = []
        for name in ("tensor-parallel", "expert.parallel"):
            with tracker.fork(name):
                found += torch.rand(2).tolist()
        return found

    numbers()
    RngSnapshot.take().save(Path(folder), 0, 1)
    first, later = numbers(), numbers()
    loaded = RngSnapshot.load(Path(folder), 0, 1)
    assert loaded is not None
    loaded.restore()
    return [first, later, numbers(), sorted(loaded.tracker)]


@pytest.mark.ranks
def test_megatrons_streams(active, tmp_path):
    first, later, again, names = active(with_a_tracker, str(tmp_path))
    assert again == first != later
    assert names == ["expert.parallel", "tensor-parallel"]
