"""Named streams of random numbers, one device generator.

Room runtime/. Stands in for megatron.core.tensor_parallel.random.CudaRNGStatesTracker (core_v0.13.1), which
compares CUDA's state with the host's and so cannot work where the two are one. Draws the same numbers.
Imports torch for type checking only. Proof: tests/runtime/test_rng.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nxdt_nemo.runtime.lane import Lane

if TYPE_CHECKING:
    import torch

__all__ = ["RngStreams"]


class RngStreams:
    """Streams by name; inside fork(name) the device's generator is that stream, outside it is untouched.

    Forks nest: inside fork("a"), fork("b") and again fork("a") each go on where their stream stopped.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self.reset()

    def reset(self) -> None:
        """Forget all streams."""
        self._states: dict[str, torch.Tensor] = {}
        self._seeds: set[int] = set()
        self._entered: list[str] = []

    def add(self, name: str, seed: int) -> None:
        """A stream that starts at `seed`. Raises ValueError for a name or a seed that is taken."""
        if name in self._states:
            raise ValueError(f"random stream {name!r} exists already")
        if seed in self._seeds:
            raise ValueError(f"seed {seed} of random stream {name!r} is taken by another stream")
        before = self._lane.rng_state()
        self._lane.manual_seed(seed)
        self._states[name] = self._lane.rng_state()
        self._seeds.add(seed)
        self._lane.set_rng_state(before)

    @contextmanager
    def fork(self, name: str) -> Iterator[None]:
        """Draw from the stream. Raises KeyError for one that was not added."""
        if name not in self._states:
            known = ", ".join(self._states) or "none"
            raise KeyError(f"no random stream {name!r}; there are: {known}")
        outside = self._lane.rng_state()
        if self._entered:
            self._states[self._entered[-1]] = outside
        self._entered.append(name)
        self._lane.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = self._lane.rng_state()
            self._entered.pop()
            self._lane.set_rng_state(self._states[self._entered[-1]] if self._entered else outside)

    def get_states(self) -> dict[str, torch.Tensor]:
        """Each stream's state; the tensors are never written to afterwards."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Go on from states that get_states gave; streams that are not in them are gone."""
        self._states = dict(states)
