"""Named random streams: they draw what megatron-core's tracker draws, and leave the default stream alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nxdt_nemo.runtime.cpu import CpuLane
from nxdt_nemo.runtime.rng import RngStreams


@pytest.fixture(autouse=True)
def _own_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def streams() -> RngStreams:
    made = RngStreams(CpuLane())
    made.add("a", 11)
    made.add("b", 22)
    return made


def stream(seed: int, *sizes: int) -> list[torch.Tensor]:
    """Consecutive draws of these sizes from a generator of that seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) for size in sizes]


def test_forks_continue_their_stream_and_not_the_default(streams: RngStreams) -> None:
    first, second = stream(11, 3, 3)
    outside = stream(0, 2, 2)
    assert torch.equal(torch.rand(2), outside[0])
    with streams.fork("a"):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(2), outside[1])
    with streams.fork("a"):
        assert torch.equal(torch.rand(3), second)


def test_nested_forks(streams: RngStreams) -> None:
    a, b = stream(11, 2, 2, 2), stream(22, 2, 2)
    with streams.fork("a"):
        assert torch.equal(torch.rand(2), a[0])
        with streams.fork("b"):
            assert torch.equal(torch.rand(2), b[0])
            with streams.fork("a"):
                assert torch.equal(torch.rand(2), a[1])
            assert torch.equal(torch.rand(2), b[1])
        assert torch.equal(torch.rand(2), a[2])
    assert torch.equal(torch.rand(2), stream(0, 2)[0])


def test_an_exception_restores(streams: RngStreams) -> None:
    def fails() -> None:
        with streams.fork("a"):
            torch.rand(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.equal(torch.rand(2), stream(0, 2)[0])
    with streams.fork("a"):
        assert torch.equal(torch.rand(2), stream(11, 2, 2)[1])


def test_states_resume(streams: RngStreams) -> None:
    with streams.fork("a"):
        torch.rand(5)
    saved = {name: state.clone() for name, state in streams.get_states().items()}
    held = streams.get_states()
    with streams.fork("a"):
        right = torch.rand(4)
    assert torch.equal(held["a"], saved["a"]), "states that were handed out changed"
    later = RngStreams(CpuLane())
    later.set_states(saved)
    with later.fork("a"):
        assert torch.equal(torch.rand(4), right)
    assert set(later.get_states()) == {"a", "b"}


def test_add_leaves_the_default_stream(streams: RngStreams) -> None:
    streams.add("c", 33)
    assert torch.equal(torch.rand(2), stream(0, 2)[0])


def test_names_and_seeds_are_unique(streams: RngStreams) -> None:
    with pytest.raises(ValueError, match="'a' exists"):
        streams.add("a", 44)
    with pytest.raises(ValueError, match="seed 11 of random stream 'd'"):
        streams.add("d", 11)
    with pytest.raises(KeyError, match="there are: a, b"):
        streams.fork("d").__enter__()
    streams.reset()
    streams.add("d", 11)


def test_draws_what_megatron_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's tracker on the same generator, with the two CUDA calls that it makes sent to it."""
    random = pytest.importorskip("megatron.core.tensor_parallel.random", reason="megatron-core is not installed")
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(random, "_get_cuda_rng_state", lambda **_: torch.get_rng_state())
    monkeypatch.setattr(random, "_set_cuda_rng_state", lambda state, **_: torch.set_rng_state(state))
    drawn = []
    for made in (random.CudaRNGStatesTracker(), RngStreams(CpuLane())):
        torch.manual_seed(0)
        made.add("model-parallel-rng", 1234 + 2718)
        found = [torch.rand(3)]
        for _ in range(2):
            with made.fork("model-parallel-rng"):
                found.append(torch.nn.functional.dropout(torch.ones(16), 0.5))
            found.append(torch.randn(3))
        drawn.append(torch.cat(found))
    assert torch.equal(*drawn)
