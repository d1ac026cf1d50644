"""What Neuron's PJRT client is told of a process's rank, and what the lane asks it once the ranks are up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.runtime.xla import pjrt
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPools, lane_here
from nxdt_nemo.testing.traced import TRACED_ENV

TOLD = (pjrt.INDEX, pjrt.WORLD, pjrt.CORES, pjrt.LOCAL_INDEX, pjrt.LOCAL_COUNT)
OURS = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}

# torch_xla where libneuronxla is installed and a Neuron device is there; its client is not made.
SCRIPT = f"""
import os
from nxdt_nemo.runtime.xla import lane
lane.neuron_devices = lambda: 2
here = lane.XlaLane()
here.enter_process()
import torch_xla
assert here.device().type == "xla" and not torch_xla._XLAC._xla_runtime_is_initialized()
print([os.environ.get(name) for name in {TOLD}])
"""


@pytest.fixture(scope="module")
def libneuronxla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package in the place of AWS's."""
    root = tmp_path_factory.mktemp("stub")
    (root / "libneuronxla").mkdir()
    (root / "libneuronxla" / "__init__.py").write_text("def configure_environment(): pass\n")
    (root / "libneuronxla" / "libneuronpjrt_path.py").write_text("def libneuronpjrt_path(): return 'none'\n")
    return root


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (OURS, ["5", "8", "1", "1", "4"]),
        (SRUN, ["5", "8", "1", "1", None]),
        pytest.param(OURS | {"TORCHELASTIC_RUN_ID": "x"}, ["5", "8", "1", "1", "4"], marks=pytest.mark.slow),
        pytest.param({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, [None] * 5, marks=pytest.mark.slow),  # a batch script
    ],
)
def test_each_launchers_ranks_are_told_as_torchruns(
    with_torch_xla: None, libneuronxla: Path, given: dict[str, str], expected: list[str | None]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in (*TOLD, *OURS, *SRUN)}
    environment["PYTHONPATH"] = os.pathsep.join([str(libneuronxla), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(expected)


def test_what_is_set_stays_and_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TOLD, *OURS, pjrt.TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")  # Lightning's first rank, which was no rank when the process began
    monkeypatch.setenv(pjrt.CORES, "3")
    undo = pjrt.tell(1, 2)
    assert [os.environ.get(name) for name in TOLD] == ["1", "2", "3", "1", None]
    undo()
    assert [os.environ.get(name) for name in TOLD] == [None, None, "3", None, None]


@pytest.fixture(scope="module")
def pools(with_torch_xla: None) -> Iterator[Callable[..., list[Any]]]:
    """pools(world, function, *args) on ranks whose lane is xla."""
    with RankPools() as pools:
        yield lambda world, function, *args: pools(world, function, *args, init=ACTIVE, env=TRACED_ENV, group=False)


def met(shift: int, count: int, answers: bool) -> str:
    """What the lane says as if this were a device: a client that goes by other numbers, collectives that do nothing."""
    import torch.distributed as dist
    import torch_xla.runtime as xr

    from nxdt_nemo.errors import LaneError
    from nxdt_nemo.runtime.xla.lane import XlaLane
    from nxdt_nemo.runtime.xla.ops import hosted

    lane_here()  # the ranks
    kept = xr.global_ordinal, xr.global_device_count
    lane: Any = XlaLane()
    lane.__dict__ |= {"_on_host": False, "ops": hosted()}
    if not answers:
        object.__setattr__(lane.ops, "all_reduce_", lambda x, group, op: x)
    try:
        xr.global_ordinal, xr.global_device_count = lambda: dist.get_rank() + shift, lambda: count
        lane.ranks_are_up()
    except LaneError as error:
        return error.reason
    finally:
        xr.global_ordinal, xr.global_device_count = kept
    return ""


@pytest.mark.ranks
def test_ranks_that_the_client_does_not_have_are_one_line(pools: Callable[..., list[Any]]) -> None:
    assert pools(2, met, 0, 2, True) == ["", ""]
    assert pools(2, met, 0, 1, True) == ["rank 0 of 2 is device 0 of 1 to PJRT", "rank 1 of 2 is device 1 of 1 to PJRT"]
    assert pools(2, met, 1, 2, True)[0] == "rank 0 of 2 is device 1 of 2 to PJRT"
    assert pools(2, met, 0, 2, False)[1] == "1 of 2 ranks answer rank 1 on the device"
