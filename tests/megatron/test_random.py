"""Megatron's tracked random streams on the lane's generator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, forget_groups
from nxdt_nemo.testing.pool import lane_here
from nxdt_nemo.testing.traced import TRACED_ENV

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


def dropped_out(offset: bool, restored: bool) -> dict[str, Any]:
    """Masks of dropout on the device, tensor-parallel ranks being two processes of the xla lane.

    offset     the tracker's seed is another on each rank, as Megatron has it
    restored   recomputation begins with the random states of the first run, as Megatron has it
    """
    import torch_xla
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.tensor_parallel import random
    from torch.nn.functional import dropout

    lane = lane_here()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    random.model_parallel_cuda_manual_seed(1234, tp_rank=None if offset else 0)
    tracker, ones = random.get_cuda_rng_tracker(), torch.ones(64, device=lane.device())

    def inside(x: torch.Tensor) -> torch.Tensor:
        with tracker.fork():
            return dropout(x, 0.5)

    def three() -> dict[str, torch.Tensor]:
        return {"outside": dropout(ones, 0.5), "inside": inside(ones), "inside again": inside(ones)}

    lane.cut()
    states = random._get_all_rng_states()
    first = three() | {"bernoulli": torch.bernoulli(ones / 2)}
    x = ones.clone().requires_grad_()
    with nullcontext() if restored else mock.patch.object(random, "_set_all_rng_states"):
        y = tensor_parallel.checkpoint(lambda x: inside(dropout(x, 0.5)), False, x)
        y.sum().backward()
    text = torch_xla._XLAC._get_xla_tensors_hlo([*first.values(), y, x.grad])
    lane.step_boundary()
    later = three()
    random._set_all_rng_states(*states)
    repeated = three()
    masks = {"first": first, "later": later, "repeated": repeated, "recomputed": {"forward": y, "backward": x.grad}}
    found = {part: {name: mask.tolist() for name, mask in made.items()} for part, made in masks.items()}
    forget_groups()
    return found | {"text": text}


@pytest.fixture(scope="module")
def two_traced(gloo: Callable[..., Any], with_torch_xla: None) -> Callable[..., Any]:
    """two_traced(function, *args): its results from two processes of the xla lane."""
    return lambda function, *args: gloo(2, function, *args, init=ACTIVE, env=TRACED_ENV, group=False)


def test_tensor_parallel_ranks_on_the_xla_lane_draw_what_megatron_means(two_traced: Callable[..., Any]) -> None:
    one, other = two_traced(dropped_out, True, True)
    for part in ("first", "later"):
        assert one[part]["outside"] == other[part]["outside"]
        assert one[part]["inside"] != other[part]["inside"]
        assert one[part]["inside again"] != other[part]["inside again"]
    assert one["first"]["bernoulli"] == other["first"]["bernoulli"]
    for found in (one, other):
        drawn = [mask for part in ("first", "later") for mask in found[part].values()]
        assert all(len(set(mask)) == 2 for mask in drawn)  # some are dropped, some are not
        assert all(mask not in drawn[:place] for place, mask in enumerate(drawn))  # streams go on
        assert all(mask == found["first"][name] for name, mask in found["repeated"].items())
        assert found["recomputed"]["forward"] == found["recomputed"]["backward"]
    assert one["recomputed"] != other["recomputed"]
    assert one["text"] == other["text"] and "rng-bit-generator" in one["text"]  # the seed is a value of the device


def test_ranks_that_draw_alike_would_be_seen(two_traced: Callable[..., Any]) -> None:
    """Without the rank in the tracker's seed, and without the states for a second run."""
    one, other = two_traced(dropped_out, False, False)
    assert one["first"]["inside"] == other["first"]["inside"]
    assert one["recomputed"]["forward"] != one["recomputed"]["backward"]
