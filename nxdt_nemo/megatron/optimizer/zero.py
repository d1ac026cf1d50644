"""ZeRO-1: a data-parallel rank updates its part of the parameters and keeps optimizer state for that part only.

Room megatron/. What both sharded optimizers are made of: distrib_optimizer.py (megatron-core's buffers) and
nemo/core/optim/distributed_adam.py (its own). A parameter is cut wherever the boundary between two ranks falls in the
flat buffer, so that the parts are equal to the element. Where graphs are traced: traced_zero.py.
Proof: tests/megatron/test_zero.py.
Paper: Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1 (P_os).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nxdt_nemo.megatron.optimizer.norms import copy_marks, share
from nxdt_nemo.runtime.rounding import copy_rounded_

__all__ = [
    "Bucket",
    "Division",
    "Part",
    "Piece",
    "States",
    "allocate",
    "gather_parameters",
    "moments",
    "reduce_gradients",
]

Span = tuple[nn.Parameter, int, int]
States = MutableMapping[Tensor, dict[str, Tensor]]


def moments(states: States, main: Tensor) -> dict[str, Tensor]:
    """Adam's of a main parameter, float32 in its shape: zero, and noted, where it has none yet.

    They come from the host: made on a device that traces, they would be made in the first step's graph, and only there.
    """
    state = states[main]
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros(main.shape).to(main.device)
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True, eq=False)
class Part(ABC):
    """Elements start .. stop of a parameter, flattened, that this rank updates; n = stop - start."""

    param: nn.Parameter
    start: int
    stop: int

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a tensor of the parameter's shape, [n]."""
        return whole.reshape(-1)[self.start : self.stop]

    @abstractmethod
    def publish(self, step: int) -> None:
        """Put the main parameter into the model's, as it is after `step` steps."""

    @abstractmethod
    def state(self, states: States) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, [n] float32 each: fp32_param of half precision parameters, both moments.

        states  the stepping optimizer's, by main parameter
        """


@dataclass(frozen=True, eq=False)
class Piece(Part):
    """A part, and what it is updated in.

    model   [n]  view of the parameter, its dtype
    grad    [n]  view of its gradient, the buffer's dtype
    main    [n]  float32, what the optimizer steps: `model` itself where that is float32, else a copy
    """

    model: Tensor
    grad: Tensor
    main: Tensor

    def begin(self, states: States) -> None:
        """Nothing: the optimizer makes its state at the first step."""

    def collect(self) -> None:
        """Give the main parameter its gradient: a float32 buffer's own view, else a copy."""
        self.main.grad = self.grad.float()

    def drop(self) -> None:
        """Take it away again."""
        self.main.grad = None

    def counted(self) -> list[Tensor]:
        """The gradient, if it counts in a norm on this rank."""
        grad = self.grad if self.main.grad is None else self.main.grad
        return [grad] if share(self.param) else []

    def refresh(self) -> None:
        """Take the main parameter from the model's again."""
        if self.main is not self.model:
            self.main.copy_(self.model)

    def publish(self, step: int) -> None:
        if self.main is not self.model:
            copy_rounded_(self.model, self.main, step)

    def state(self, states: States) -> dict[str, Tensor]:
        main = {} if self.main is self.model else {"fp32_param": self.main}
        return {**main, **moments(states, self.main)}


@dataclass(frozen=True, eq=False)
class Division:
    """Some parameters one after the other, and which of the group's d ranks updates which elements: equal parts.

    spans    each parameter with its first element and the one after its last
    group    data-parallel ranks (with context parallelism, or of the experts)
    """

    spans: Sequence[Span]
    group: dist.ProcessGroup

    @cached_property
    def size(self) -> int:
        """Elements N, a multiple of d."""
        last = max(last for _, _, last in self.spans)
        return last + -last % self.group.size()

    def part(self, rank: int) -> tuple[int, int]:
        """The range of elements that the group's rank `rank` updates."""
        size = self.size // self.group.size()
        return rank * size, (rank + 1) * size

    def holders(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """(rank, start, stop) for each rank that updates some of the elements first .. last; counted from `first`."""
        found = []
        for rank in range(self.group.size()):
            low, high = self.part(rank)
            start, stop = max(first, low), min(last, high)
            if start < stop:
                found.append((rank, start - first, stop - first))
        return found

    def _mine(self) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        rank = self.group.rank()
        for param, first, last in self.spans:
            for holder, start, stop in self.holders(first, last):
                if holder == rank:
                    yield param, first, start, stop


@dataclass(frozen=True, eq=False)
class Bucket(Division):
    """A division of flat buffers, laid out alike on each rank of the group.

    params   [N]  N divisible by d; the parameters are views of it
    grads    [N]  float32, or what gradients are reduced in; the parameters' main_grad are views of it
    """

    params: Tensor
    grads: Tensor

    def clear(self) -> None:
        """Begin the sums of gradients anew."""
        self.grads.zero_()

    @cached_property
    def size(self) -> int:
        return self.params.numel()

    @cached_property
    def pieces(self) -> dict[nn.Parameter, Piece]:
        """This rank's pieces, in the order of the buffers. Copies are made when first asked for."""
        return {param: self._piece(*found) for found in self._mine() for param in found[:1]}

    def _piece(self, param: nn.Parameter, first: int, start: int, stop: int) -> Piece:
        place = slice(first + start, first + stop)
        model, grad = self.params[place].detach(), self.grads[place]
        main = model if model.dtype == torch.float32 else model.float()
        copy_marks(main, param)
        return Piece(param, start, stop, model, grad, main)


def allocate(params: Sequence[nn.Parameter], group: dist.ProcessGroup) -> Bucket:
    """Move parameters of one dtype into a flat buffer, with a float32 gradient buffer beside it.

    A float32 parameter's `grad` is its view of the gradient buffer, so that backward adds to it in place; the caller
    brings other parameters' gradients to `main_grad`. Values are kept.
    """
    first = params[0]
    size = sum(param.numel() for param in params)
    size += -size % group.size()
    values = torch.zeros(size, dtype=first.dtype, device=first.device)
    grads = torch.zeros(size, dtype=torch.float32, device=first.device)
    spans, at = [], 0
    for param in params:
        place = slice(at, at + param.numel())
        values[place].copy_(param.detach().reshape(-1))
        param.data = values[place].view(param.shape)
        param.main_grad = grads[place].view(param.shape)  # type: ignore[attr-defined]
        if param.dtype == torch.float32:
            param.grad = param.main_grad  # type: ignore[attr-defined]
        spans.append((param, place.start, place.stop))
        at = place.stop
    return Bucket(spans, group, values, grads)


def reduce_gradients(buckets: Sequence[Bucket], dtype: torch.dtype = torch.float32) -> None:
    """Average the gradients over each bucket's group; a rank gets the mean of its own part, the rest is undefined.

    dtype   of what is sent
    Bytes received a rank: N * itemsize * (d - 1) / d. All buckets are under way together.
    """
    started: list[tuple[Any, Tensor, Tensor]] = []
    for bucket in buckets:
        ranks = bucket.group.size()
        if ranks == 1:
            continue
        mine = bucket.grads[slice(*bucket.part(bucket.group.rank()))]
        bucket.grads.mul_(1.0 / ranks)
        sent = bucket.grads.to(dtype)
        received = torch.empty_like(mine, dtype=dtype)
        work = dist.reduce_scatter_tensor(received, sent, group=bucket.group, async_op=True)
        started.append((work, mine, received))
    for work, mine, received in started:
        work.wait()
        mine.copy_(received)


def gather_parameters(buckets: Sequence[Bucket]) -> None:
    """Give each rank the parameters that the others have updated.

    Bytes received a rank: N * itemsize * (d - 1) / d. All buckets are under way together.
    """
    started = []
    for bucket in buckets:
        if bucket.group.size() > 1:
            mine = bucket.params[slice(*bucket.part(bucket.group.rank()))]
            started.append(dist.all_gather_into_tensor(bucket.params, mine.clone(), group=bucket.group, async_op=True))
    for work in started:
        work.wait()
