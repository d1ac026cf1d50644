"""ZeRO-1 where steps are traced: all ranks of a data-parallel group have one and the same graph.

Room megatron/. Beside zero.py, whose pieces are cut where a rank's part begins: another graph on each rank. Here a
bucket's gradients are put together, reduce-scattered, stepped as one tensor, gathered and taken apart again, and no
number of a rank is in the graph. Parameters and gradients stay tensors of their own. A bucket has parameters of one
dtype and one group of hyper-parameters, whose elements all count alike in a norm: nothing is masked.
Checkpoints are those of zero.py's buckets, put together on the host. Proof: tests/megatron/test_xla_zero.py.
Paper: Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1 (P_os).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nxdt_nemo.megatron.optimizer.norms import scaled, share
from nxdt_nemo.megatron.optimizer.zero import Bucket, Division, Part, States, moments
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.select import current

__all__ = ["HostBucket", "TracedBucket", "alike", "on_host", "to_device"]


def alike(params: Iterable[nn.Parameter], kind: Callable[[nn.Parameter], Any]) -> list[list[nn.Parameter]]:
    """The parameters by `kind`, dtype and what they count in a norm: what a TracedBucket can hold. Order is kept."""
    found: dict[Any, list[nn.Parameter]] = {}
    for param in params:
        found.setdefault((kind(param), param.dtype, share(param)), []).append(param)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class TracedBucket(Division):
    """A division of parameters that stay where they are; N elements with the padding, n = N / d.

    scale      what gradients are multiplied by before they are summed over the group
    sent       dtype that they are summed in
    instances  ranks that hold the same state, over which the sums are summed again
    Bytes received a rank and step: N * itemsize * (d - 1) / d of gradients, as much of parameters.
    """

    scale: float
    sent: torch.dtype
    instances: dist.ProcessGroup | None

    @classmethod
    def of(
        cls,
        params: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        scale: float,
        sent: torch.dtype,
        instances: dist.ProcessGroup | None = None,
    ) -> TracedBucket:
        """The parameters one after the other."""
        ends = [*accumulate(param.numel() for param in params)]
        spans = [(param, end - param.numel(), end) for param, end in zip(params, ends, strict=True)]
        return cls(spans, group, scale, sent, instances)

    @cached_property
    def params(self) -> list[nn.Parameter]:
        """In the order of the spans."""
        return [param for param, _, _ in self.spans]

    @cached_property
    def pieces(self) -> dict[nn.Parameter, TracedBucket]:
        """The bucket itself: a parameter has no piece of its own."""
        return dict.fromkeys(self.params, self)

    @property
    def in_float32(self) -> bool:
        """Are the parameters their own main parameters?"""
        return self.params[0].dtype == torch.float32

    @cached_property
    def _group(self) -> Group:
        return current().group_of(self.group)

    @cached_property
    def main(self) -> Tensor:
        """[n], float32, what the optimizer steps. Of float32 parameters it has no values of its own between steps.

        From the host: a tensor that is made on the device would be made in the first step's graph, and only there.
        """
        main = self._zeros().to(self.params[0].device)
        return main if self.in_float32 else main.copy_(self._values())

    def _values(self) -> Tensor:
        """This rank's part of the parameters, [n]."""
        return self._group.ops.shard(self._whole(self.params), 0, self._group)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size // self.group.size())

    def _whole(self, tensors: Sequence[Tensor]) -> Tensor:
        """[N], of tensors in the parameters' shapes."""
        flat = [tensor.detach().reshape(-1) for tensor in tensors]
        padding = self.size - sum(tensor.numel() for tensor in flat)
        return torch.cat([*flat, flat[0].new_zeros(padding)] if padding else flat)

    # --- step ----------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Give the main parameter the sum of the ranks' gradients, [n] float32, and its values where it needs them.

        Once between two calls of drop(), or of publish().
        """
        if self.main.grad is not None:
            return
        whole = self._whole([param.main_grad for param in self.params])  # type: ignore[attr-defined]
        if self.scale != 1.0:
            whole = whole * self.scale
        mine = self._group.ops.reduce_scatter(whole.to(self.sent), 0, self._group)
        if self.instances is not None:
            between = current().group_of(self.instances)
            mine = between.ops.all_reduce_(mine, between, "sum")
        self.main.grad = mine.float()
        if self.in_float32:
            self.refresh()

    def clear(self) -> None:
        """Begin the sums of gradients anew."""
        torch._foreach_zero_([param.main_grad for param in self.params])  # type: ignore[attr-defined]
        self.drop()

    def drop(self) -> None:
        """Forget the gradient."""
        self.main.grad = None

    def counted(self) -> list[Tensor]:
        """The gradient, if it counts in a norm, scaled so that its squares count what they should."""
        self.collect()
        counts, grad = share(self.params[0]), self.main.grad
        return [scaled(grad, counts)] if counts and grad is not None else []

    def refresh(self) -> None:
        """Take the main parameter from the model's."""
        self.main.copy_(self._values())

    def publish(self, step: int) -> None:
        """Put all ranks' main parameters into the model's, in the model's dtype already on their way."""
        whole = self._group.ops.all_gather(self.main.to(self.params[0].dtype), 0, self._group)
        for param, first, last in self.spans:
            param.detach().copy_(whole[first:last].view(param.shape))
        self.drop()

    # --- state ---------------------------------------------------------------------------------------

    def begin(self, states: States) -> None:
        """Make the optimizer's state before the first step, which has the graph of all others then."""
        moments(states, self.main)

    def on_host(self, states: States, *, read: bool) -> HostBucket:
        """The state with copies of its tensors; with read=False without their values, to load others into it."""
        kept = {**({} if self.in_float32 else {"fp32_param": self.main}), **moments(states, self.main)}
        copies = {name: tensor.cpu() if read else self._zeros() for name, tensor in kept.items()}
        return HostBucket(self.spans, self.group, copies, kept)


@dataclass(frozen=True, eq=False)
class HostPart(Part):
    """A part, and its elements of a bucket's tensors: views, [n] float32."""

    tensors: dict[str, Tensor]

    def publish(self, step: int) -> None:
        """Nothing: the model's parameters are in the checkpoint, and main parameters on another device."""

    def state(self, states: States) -> dict[str, Tensor]:
        return self.tensors


@dataclass(frozen=True, eq=False)
class HostBucket(Division):
    """A TracedBucket's state on the host: exp_avg, exp_avg_sq, and fp32_param of parameters in half precision.

    tensors   [n] float32 each
    devices   those that they are copies of
    """

    tensors: dict[str, Tensor]
    devices: dict[str, Tensor]

    @cached_property
    def pieces(self) -> dict[nn.Parameter, HostPart]:
        """This rank's parts, as a sharded optimizer's elsewhere."""
        low, _ = self.part(self.group.rank())
        found = {}
        for param, first, start, stop in self._mine():
            place = slice(first + start - low, first + stop - low)
            tensors = {name: tensor[place] for name, tensor in self.tensors.items()}
            found[param] = HostPart(param, start, stop, tensors)
        return found

    def to_device(self) -> None:
        """Put what was loaded where it is stepped."""
        for name, tensor in self.tensors.items():
            self.devices[name].copy_(tensor)


def on_host(buckets: Sequence[Bucket | TracedBucket], states: States, *, read: bool) -> Sequence[Bucket | HostBucket]:
    """For a checkpoint: buckets whose parts' state is on the host, see TracedBucket.on_host; others as they are."""
    if read and any(isinstance(bucket, TracedBucket) for bucket in buckets):
        current().synchronize()  # one graph ends here, not one at each copy
    return [bucket.on_host(states, read=read) if isinstance(bucket, TracedBucket) else bucket for bucket in buckets]


def to_device(buckets: Iterable[Bucket | HostBucket]) -> None:
    """After loading: the way back."""
    for bucket in buckets:
        if isinstance(bucket, HostBucket):
            bucket.to_device()
