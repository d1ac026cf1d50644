"""ZeRO-1: a data-parallel rank updates its part of the parameters and keeps optimizer state for that part only.

Room megatron/. What both sharded optimizers are made of: distrib_optimizer.py (megatron-core's buffers) and
nemo/core/optim/distributed_adam.py (its own). A parameter is cut wherever the boundary between two ranks falls in the
flat buffer, so that the parts are equal to the element. Proof: tests/megatron/test_zero.py.
Paper: Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1 (P_os).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes
from torch import Tensor, nn

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.rounding import copy_rounded_
from nxdt_nemo.runtime.select import current

__all__ = ["Bucket", "Piece", "allocate", "gather_parameters", "reduce_gradients", "refuse_on_traced_lanes"]

Span = tuple[nn.Parameter, int, int]


@dataclass(frozen=True, eq=False)
class Piece:
    """What this rank updates of one parameter: elements start .. stop of it, flattened; n = stop - start.

    model   [n]  view of the parameter, its dtype
    grad    [n]  view of its gradient, the buffer's dtype
    main    [n]  float32, what the optimizer steps: `model` itself where that is float32, else a copy
    """

    param: nn.Parameter
    start: int
    stop: int
    model: Tensor
    grad: Tensor
    main: Tensor

    def cut(self, whole: Tensor) -> Tensor:
        """This piece of a tensor of the parameter's shape, [n]."""
        return whole.reshape(-1)[self.start : self.stop]

    def refresh(self) -> None:
        """Take the main parameter from the model's again."""
        if self.main is not self.model:
            self.main.copy_(self.model)

    def publish(self, step: int) -> None:
        """Put the main parameter into the model's, as it is after `step` steps."""
        if self.main is not self.model:
            copy_rounded_(self.model, self.main, step)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Some parameters and their gradients in flat buffers, laid out alike on each of the group's d ranks.

    spans    each parameter with its first element and the one after its last
    params   [N]  N divisible by d; the parameters are views of it
    grads    [N]  float32, or what gradients are reduced in; the parameters' main_grad are views of it
    group    data-parallel ranks (with context parallelism, or of the experts)
    """

    spans: Sequence[Span]
    params: Tensor
    grads: Tensor
    group: dist.ProcessGroup

    def part(self, rank: int) -> tuple[int, int]:
        """The range of elements that the group's rank `rank` updates."""
        size = self.params.numel() // self.group.size()
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

    @cached_property
    def pieces(self) -> dict[nn.Parameter, Piece]:
        """This rank's pieces, in the order of the buffers. Copies are made when first asked for."""
        return {param: self._piece(*found) for found in self._mine() for param in found[:1]}

    def _mine(self) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        rank = self.group.rank()
        for param, first, last in self.spans:
            for holder, start, stop in self.holders(first, last):
                if holder == rank:
                    yield param, first, start, stop

    def _piece(self, param: nn.Parameter, first: int, start: int, stop: int) -> Piece:
        place = slice(first + start, first + stop)
        model, grad = self.params[place].detach(), self.grads[place]
        main = model if model.dtype == torch.float32 else model.float()
        copy_tensor_model_parallel_attributes(main, param)
        for name in ("shared", "allreduce"):
            if hasattr(param, name):
                setattr(main, name, getattr(param, name))
        return Piece(param, start, stop, model, grad, main)


def refuse_on_traced_lanes(place: str, fix: str) -> None:
    """Raise LaneError where graphs are traced: each rank's pieces would be another graph."""
    lane = current()
    if lane.traced:
        raise LaneError(f"sharded optimizers are not on the {lane.name} lane in this release yet", place=place, fix=fix)


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
    return Bucket(spans, values, grads, group)


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
