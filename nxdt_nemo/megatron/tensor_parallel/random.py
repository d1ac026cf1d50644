"""The random states that Megatron tracks by name (model-parallel, data-parallel, expert-parallel).

Room megatron/. Reads and sets megatron.core.tensor_parallel.random's tracker; upstream's class is used as it
is, on the view of torch.cuda, but for `fork`. May import torch and nxdt_nemo.runtime.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nxdt_nemo.runtime import current

__all__ = ["fork", "get_tracker_states", "set_tracker_states"]


def _tracker() -> Any:
    module = sys.modules.get("megatron.core.tensor_parallel.random")
    return getattr(module, "_CUDA_RNG_STATE_TRACKER", None)


def get_tracker_states() -> dict[str, torch.Tensor]:
    """Tracked states by name, uint8 [n]; {} before Megatron has a tracker."""
    tracker = _tracker()
    return dict(tracker.get_states()) if tracker is not None else {}


def set_tracker_states(states: dict[str, torch.Tensor]) -> None:
    """Set the tracked states; nothing to do before Megatron has a tracker."""
    tracker = _tracker()
    if tracker is not None and states:
        tracker.set_states(dict(states))


@contextmanager
def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from the stream `name` within, and from the caller's again after.

    CudaRNGStatesTracker.fork without its check that the CPU's stream stands still: on the cpu lane the
    device's stream is the CPU's.
    Raises KeyError for a stream that was not added.
    """
    if name not in self.states_:
        raise KeyError(f"random stream {name!r} was not added to the tracker")
    lane = current()
    outside = lane.rng_state()
    lane.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = lane.rng_state()
        lane.set_rng_state(outside)
