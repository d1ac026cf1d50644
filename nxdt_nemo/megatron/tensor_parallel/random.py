"""The random states that Megatron tracks by name (model-, data- and expert-parallel), and recomputation.

Room megatron/. Reads and sets megatron.core.tensor_parallel.random's tracker; upstream's classes are used as they
are, on the view of torch.cuda, but for `fork`, `checkpoint` and one constructor. May import torch and the runtime.
Proof: tests/megatron/test_random.py, test_recompute.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from nxdt_nemo.errors import UserError
from nxdt_nemo.runtime import current
from nxdt_nemo.runtime.unread import counted, skipping

__all__ = ["checkpoint", "fork", "get_tracker_states", "init_checkpoint_without_output", "set_tracker_states"]


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


def init_checkpoint_without_output(original: Callable[..., None], self: Any, fp8: Any = False) -> None:
    """CheckpointWithoutOutput.__init__, whose default False upstream takes for a format of fp8: it asks for None.

    Raises UserError on a lane whose tensors have no storage: it gives the memory of a tensor back that others hold.
    """
    if not current().has_storages:
        raise UserError(
            f"layernorm, moe_act and mla_up_proj are not recomputed on the {current().name} lane",
            place="recompute_modules",
            fix="use core_attn, mlp or moe, or recompute_granularity=full",
        )
    original(self, fp8 or None)


def checkpoint(original: Callable[..., Any], function: Callable[..., Any], distribute: bool, *args: Any) -> Any:
    """checkpoint, of a function that may hand a parameter through, as an MLP does its bias.

    Returned as it is from upstream's autograd function, the parameter itself becomes that node's output: the second
    run then differentiates through the first one, and so on, twice as often a layer.
    On a lane that compiles steps the second run is kept apart from the first, and begins when its gradients are there:
    a compiler would find that both compute the same, and keep the first one's results.
    The second run's results are read by nobody: what it would send for them alone is not sent.
    """
    gradients: list[torch.Tensor] = []
    runs = _Runs(function)

    def without_parameters(*inputs: Any) -> Any:
        if gradients:
            given = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
            current().optimization_barrier_([*given, *gradients])
            gradients.clear()
        outputs = runs(*inputs)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple(out.view_as(out) if isinstance(out, torch.nn.Parameter) else out for out in outputs)

    outputs = original(without_parameters, distribute, *args)
    if current().traced:
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        node = next((out.grad_fn for out in given if isinstance(out, torch.Tensor) and out.grad_fn is not None), None)
        if node is not None:
            node.register_prehook(lambda grads: gradients.extend(grad for grad in grads if grad is not None))
    return outputs


class _Runs:
    """A function's runs: the first for its results, all others for its gradients."""

    # Functions whose results are computed from values of their last collective's: not tried again.
    reading: ClassVar[set[object]] = set()

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._sent: int | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self._sent is None:
            with counted() as run:
                outputs = self._function(*inputs)
            self._sent = run.sent
            return outputs
        if current().traced:
            with current().unread():
                return self._function(*inputs)
        key = self._sent, getattr(self._function, "__code__", type(self._function))
        if not self._sent or key in self.reading:
            return self._function(*inputs)
        upstream = sys.modules["megatron.core.tensor_parallel.random"]
        states = upstream._get_all_rng_states()
        with skipping(self._sent) as run:
            outputs = self._function(*inputs)
        if not run.read:
            return outputs
        self.reading.add(key)
        upstream._set_all_rng_states(*states)
        return self._function(*inputs)
