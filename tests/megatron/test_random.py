"""Megatron's tracked random streams on the lane's generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ranks


def fresh() -> Any:
    """Upstream's tracker with two streams, in the place where upstream keeps it."""
    from megatron.core.tensor_parallel import random

    random.initialize_rng_tracker(force_reset=True)
    tracker = random.get_cuda_rng_tracker()
    tracker.add("a", 11)
    tracker.add("b", 12)
    torch.manual_seed(5)
    return tracker


def draws() -> dict[str, Any]:
    """Numbers drawn inside and outside of forks; what fork refuses."""
    tracker = fresh()
    found: dict[str, Any] = {"outside": torch.rand(1).tolist()}
    with tracker.fork("a"):
        found["a"] = torch.rand(2).tolist()
    found["outside"] += torch.rand(1).tolist()
    with tracker.fork("b"):
        found["b"] = torch.rand(1).tolist()
        with tracker.fork("a"):
            found["a"] += torch.rand(1).tolist()
        found["b"] += torch.rand(1).tolist()
    try:
        with tracker.fork("a"):
            found["a"] += torch.rand(1).tolist()
            raise LookupError
    except LookupError:
        pass
    with tracker.fork("a"):
        found["a"] += torch.rand(1).tolist()
    found["outside"] += torch.rand(1).tolist()
    try:
        with tracker.fork("c"):
            pass
    except KeyError as error:
        found["refused"] = str(error)
    found["fork"] = type(tracker).fork.__module__
    return found


def test_a_fork_draws_from_its_stream_and_leaves_the_callers_alone(active):
    found = active(draws)
    assert found["fork"] == "nxdt_nemo.megatron.tensor_parallel.random"
    for name, seed in {"a": 11, "b": 12, "outside": 5}.items():
        generator = torch.Generator().manual_seed(seed)
        counts = [2, 1, 1, 1] if name == "a" else [1] * len(found[name])  # numbers a draw
        assert found[name] == [x for count in counts for x in torch.rand(count, generator=generator).tolist()]
    assert "'c'" in found["refused"]


def saved_and_set() -> dict[str, Any]:
    from nxdt_nemo.megatron.tensor_parallel.random import get_tracker_states, set_tracker_states

    tracker = fresh()
    states = get_tracker_states()
    with tracker.fork("a"):
        first = torch.rand(4).tolist()
    with tracker.fork("a"):
        later = torch.rand(4).tolist()
    set_tracker_states(states)
    with tracker.fork("a"):
        again = torch.rand(4).tolist()
    set_tracker_states({})  # a checkpoint without streams changes nothing
    found = {"first": first, "later": later, "again": again}
    return found | {"names": sorted(get_tracker_states()), "was": sorted(states)}


def test_states_are_taken_and_set(active):
    found = active(saved_and_set)
    assert found["again"] == found["first"] != found["later"]
    assert found["names"] == found["was"] == ["a", "b"]


def test_without_megatron_there_are_no_streams():
    import sys

    from nxdt_nemo.megatron.tensor_parallel.random import get_tracker_states, set_tracker_states

    if "megatron.core.tensor_parallel.random" not in sys.modules:
        assert get_tracker_states() == {}
        set_tracker_states({"a": torch.zeros(1)})
        assert get_tracker_states() == {}
