"""The neuron lane: what it says where TorchNeuron lacks something, and on a stand-in, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.neuron import lane as module
from nxdt_nemo.runtime.neuron.lane import NeuronLane
from nxdt_nemo.testing.neuron_standin import environment
from nxdt_nemo.testing.on_a_lane import PLACED, by_the_table, expected, placed
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.pool import RankPools, lane_here

ROOT = Path(__file__).parents[2]


# --- without the stand-in: it takes a compiler 20 seconds ---


@pytest.fixture
def torchneuron(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.neuron and torch_neuronx in one, with what a test puts there."""
    names = SimpleNamespace()
    monkeypatch.setattr(module, "import_module", lambda _: names)
    monkeypatch.setattr(torch, "get_device_module", lambda _: names)
    return names


def test_no_device_is_one_line(torchneuron: SimpleNamespace) -> None:
    torchneuron.is_available = lambda: False
    with pytest.raises(LaneError) as error:
        NeuronLane().device()
    assert error.value.place == "NXDT_NEMO_RUNTIME=neuron"
    assert "no NeuronCore can be used" in error.value.reason and "neuron-ls" in error.value.fix


def test_a_function_that_this_torchneuron_lacks_is_named(torchneuron: SimpleNamespace) -> None:
    torchneuron.synchronize = lambda: None
    with pytest.raises(LaneError) as error:
        NeuronLane().memory()
    assert "has no torch.neuron.memory_allocated" in error.value.reason


def test_a_rank_on_another_core_than_its_first_is_refused(
    torchneuron: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks would put their tensors on one core."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-3")
    torchneuron.is_available, torchneuron.current_device = lambda: True, lambda: 2
    with pytest.raises(LaneError) as error:
        NeuronLane().ranks_are_up()
    assert error.value.place == "NEURON_RT_VISIBLE_CORES=0-3"
    assert "rank 2 on neuron:2" in error.value.reason


def test_memory_is_read_when_the_device_is_done(torchneuron: SimpleNamespace) -> None:
    done: list[bool] = []
    torchneuron.synchronize = lambda: done.append(True)
    torchneuron.memory_allocated = lambda: 3 * len(done)
    torchneuron.memory_reserved, torchneuron.max_memory_reserved = lambda: 5, lambda: 4
    assert NeuronLane().memory() == (3, 5, 5)  # and the figures are ordered, whatever the peak says


CORES = [  # NEURON_RT_VISIBLE_CORES, NEURON_RT_NUM_CORES, LOCAL_WORLD_SIZE, devices
    ("", "", "", 8),  # TorchNeuron's
    ("0,2", "", "", 2),
    ("4-7,9", "2", "", 5),
    ("", "2", "", 2),
    ("0-3", "", "64", 64),
]


@pytest.mark.parametrize(("visible", "number", "ranks", "count"), CORES)
def test_devices_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    torchneuron: SimpleNamespace,
    visible: str,
    number: str,
    ranks: str,
    count: int,
) -> None:
    torchneuron.device_count = lambda: 8
    said = {"NEURON_RT_VISIBLE_CORES": visible, "NEURON_RT_NUM_CORES": number, "LOCAL_WORLD_SIZE": ranks}
    for name, value in said.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert NeuronLane().device_count() == count


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("NEURON_RT_VISIBLE_CORES", "a", "is no list of cores; write it as in 0,2 or 4-7"),
        ("NEURON_RT_VISIBLE_CORES", "4-", "is no list of cores; write it as in 0,2 or 4-7"),
        ("NEURON_RT_NUM_CORES", "auto", "is no number of cores; write a number, or unset it"),
    ],
)
def test_cores_that_are_none_are_one_line(
    monkeypatch: pytest.MonkeyPatch, torchneuron: SimpleNamespace, name: str, value: str, line: str
) -> None:
    for other in ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(LaneError) as caught:
        NeuronLane().device_count()
    assert str(caught.value) == f"{name}={value}: {line}"


@pytest.mark.parametrize("asked", ["0", "1"])
def test_compiling_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **named: calls.append(named) or function)
    monkeypatch.setattr(os, "environ", os.environ | {"NXDT_NEMO_COMPILE": asked})
    assert NeuronLane().compiled(len) is len
    assert calls == ([{"backend": "neuron", "dynamic": False}] if asked == "1" else [])


def test_the_cpu_lane_lets_no_torchneuron_in(tmp_path: Path) -> None:
    """`import torch` loads it by an entry point, and fails where that fails: the cpu lane keeps it out, unbroken."""
    (tmp_path / "torch_neuronx.py").write_text("raise RuntimeError('was imported')")
    info = tmp_path / "torch_neuronx-2.14.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-neuronx\nVersion: 2.14.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_neuronx = torch_neuronx:_autoload\n")
    program = "import nxdt_nemo; nxdt_nemo.activate(); import torch; print(torch.zeros(1).device)"
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "NXDT_NEMO_RUNTIME": "cpu", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "cpu\n", done.stderr


# --- on the stand-in ---


@pytest.fixture(scope="module")
def pools(neuron_standin: Path) -> Iterator[Callable[..., list[Any]]]:
    """pools(world, function, *args, **environment) on ranks whose lane is neuron."""
    env = environment(neuron_standin) | {"NXDT_NEMO": "0"}
    with RankPools() as pools:
        yield lambda world, function, *args, **named: pools(
            world, function, *args, init=ACTIVE, env=env | named, group=False
        )


def device() -> dict[str, Any]:
    lane = lane_here()
    x = torch.ones(1000, device=lane.device())
    before = lane.memory()
    y = x + x
    after = lane.memory()
    return {
        "device": str(lane.device()),
        "found": str(y.device),
        "name": lane.name_of_device(),
        "dtypes": [lane.supports(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)],
        "grew": after.allocated - before.allocated,
        "ordered": after.allocated <= after.reserved <= after.peak <= lane.total_memory(),
    }


@pytest.mark.slow
@pytest.mark.ranks
def test_the_device(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, device)
    assert found == {
        "device": "neuron:0",
        "found": "neuron:0",
        "name": "stand-in",
        "dtypes": [True, True, False, False],
        "grew": 4000,
        "ordered": True,
    }


def draws() -> dict[str, Any]:
    """A seed twice, a state put back, a layer's dropout, and what the host drew meanwhile."""
    from nxdt_nemo.runtime.rng import RngStreams

    lane = lane_here()
    torch.manual_seed(1)
    host = torch.get_rng_state()
    lane.manual_seed(5)
    first = torch.rand(3, device=lane.device())
    state = lane.rng_state()
    second = torch.rand(3, device=lane.device())
    lane.set_rng_state(state)
    again = torch.rand(3, device=lane.device())
    streams = RngStreams(lane)
    streams.add("layer", 7)
    x = torch.ones(64, device=lane.device())
    with streams.fork("layer"):
        masks = [torch.nn.functional.dropout(x, 0.5)]
    anew = RngStreams(lane)
    anew.add("layer", 7)
    with anew.fork("layer"):
        masks.append(torch.nn.functional.dropout(x, 0.5))
    found = {"first": first, "second": second, "again": again, "mask": masks[0], "mask again": masks[1]}
    untouched = torch.equal(host, torch.get_rng_state())
    return {name: value.cpu().tolist() for name, value in found.items()} | {"host untouched": untouched}


@pytest.mark.slow
@pytest.mark.ranks
def test_random_states(pools: Callable[..., list[Any]]) -> None:
    [found] = pools(1, draws)
    assert found["first"] != found["second"] == found["again"]
    assert found["mask"] == found["mask again"] and {0.0, 2.0} == set(found["mask"])
    assert found["host untouched"]


def with_a_generator_that_stands_still() -> list[str]:
    from nxdt_nemo import console
    from nxdt_nemo.runtime import current

    lane, said = current(), []
    state = torch.zeros(16, dtype=torch.uint8)
    torch.neuron.get_rng_state = lambda *_: state  # type: ignore[attr-defined]
    torch.neuron.set_rng_state = lambda *_: None  # type: ignore[attr-defined]
    console.once = lambda text, key: said.append(text)
    lane.init_ranks(0, 1)
    return said


@pytest.mark.slow
@pytest.mark.ranks
def test_a_generator_that_is_not_drawn_from_is_told(pools: Callable[..., list[Any]]) -> None:
    [[said]] = pools(1, with_a_generator_that_stands_still, NOTE="spoiled")
    assert "do not come from torch.neuron's generator" in said


def moved_by_torch() -> bool:
    """Is the mark left where torch's own Module.to moved a layer?"""
    lane_here()
    plain = torch.nn.Linear(2, 2)
    plain.weight.tensor_model_parallel = True  # type: ignore[assignment]
    torch.nn.Module.to(plain, "neuron")
    return getattr(plain.weight, "tensor_model_parallel", False)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_placed_module_keeps_marks_and_ties(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, placed) == [{"devices": {"neuron:0"}, **PLACED}]
    assert pools(1, moved_by_torch) == [False]


def collectives() -> dict[str, Any]:
    """By the lane's table, and by torch.distributed's own calls; and two halves of the world by themselves."""
    import torch.distributed as dist

    x, found = by_the_table()
    lane, rank = lane_here(), dist.get_rank()
    [found["exchange"]] = lane.ops.exchange([(x, 1 - rank)], [(x.shape, x.dtype, 1 - rank)], lane.world()).wait()
    alone = lane.groups([[0], [1]], "alone")
    lane.barrier(alone.pg)  # TorchNeuron has the world's only
    lane.barrier()
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    devices = {str(value.device) for value in found.values()}
    return {name: value.cpu().tolist() for name, value in found.items()} | {
        "objects": objects,
        "devices": devices,
        "core": os.environ["NEURON_RT_VISIBLE_CORES"],
    }


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes(pools: Callable[..., list[Any]]) -> None:
    zero, one = [[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]
    alike = {"objects": [{"rank": 0}, {"rank": 1}], "devices": {"neuron:0"}}
    own = [expected(rank) | {"core": str(rank), "exchange": zero if rank else one} for rank in range(2)]
    assert pools(2, collectives) == [alike | part for part in own]


def compiled() -> tuple[int, bool]:
    import importlib

    from nxdt_nemo.megatron.fusions.fused_bias_gelu import bias_gelu

    lane = lane_here()
    from megatron.core.fusions import fused_bias_gelu

    bias, y = torch.randn(4, device=lane.device()), torch.randn(3, 4, device=lane.device())
    found = fused_bias_gelu.bias_gelu(bias, y)
    compiler = importlib.import_module("torch_neuronx.compiler")
    return len(compiler.graphs), torch.equal(found.cpu(), bias_gelu(bias, y).cpu())


@pytest.mark.slow
@pytest.mark.ranks
def test_upstreams_fusions_are_compiled_when_asked(pools: Callable[..., list[Any]]) -> None:
    assert pools(1, compiled, NXDT_NEMO_COMPILE="1") == [(1, True)]
    assert pools(1, compiled) == [(0, True)]


@pytest.mark.slow
def test_a_host_without_a_device_is_told_in_one_line(neuron_standin: Path) -> None:
    program = "import nxdt_nemo; nxdt_nemo.activate(); from nxdt_nemo.runtime import current; current().device()"
    env = os.environ | environment(neuron_standin) | {"NXDT_STANDIN_DEVICES": "0"}
    env["PYTHONPATH"] += f":{ROOT}"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert "LaneError: NXDT_NEMO_RUNTIME=neuron: torch.neuron.is_available() is False" in done.stderr
