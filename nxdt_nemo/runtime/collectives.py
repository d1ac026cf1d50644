"""Functional collectives, each with its backward.

Room runtime/. Stands in for megatron/core/tensor_parallel/mappings.py (core_v0.13.1). Imports torch.
Proof: tests/runtime/test_collectives.py, against the unsharded computation and against upstream's.

t is the group's size. "Whole" is the same full tensor on every rank, "part" a rank's n of t*n along dim,
"term" a tensor whose sum over the ranks is meant.

                   forward            backward            use, Megatron's name
  copy             identity           all-reduce          whole -> t uses, copy_to_tensor_model_parallel_region
  reduce           all-reduce         identity            terms -> whole, reduce_from_...
  all_reduce       all-reduce         all-reduce          terms -> whole that each rank uses in its own way
  scatter          shard              all-gather          whole -> parts, scatter_to_...
  gather           all-gather         shard               parts -> whole, used alike by all, gather_from_...
  all_gather       all-gather         reduce-scatter      parts -> whole, each rank in its own way, its term
  reduce_scatter   reduce-scatter     all-gather          terms -> parts, reduce_scatter_to_...
  all_to_all       rows to ranks      rows back           all_to_all
  reshard          parts along a dim -> along another     all_to_all_sp2hp, all_to_all_hp2sp
  permute          pairs of ranks     pairs turned round  ring attention

No input is written to. A group of one rank returns its input. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch.autograd.function import once_differentiable

from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.ops import Arriving, Receive, Send, equal_part

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "all_to_all",
    "broadcast_",
    "copy",
    "exchange",
    "gather",
    "permute",
    "reduce",
    "reduce_scatter",
    "reshard",
    "ring",
    "scatter",
]

Backward = TypeVar("Backward", bound=Callable[..., Any])


def _once(backward: Backward) -> Backward:
    return cast(Backward, once_differentiable(backward))


def _summed(x: torch.Tensor, group: Group) -> torch.Tensor:
    return group.ops.all_reduce_(x.clone(memory_format=torch.contiguous_format), group, "sum")


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(dy, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _summed(x, group)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(dy, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return group.ops.shard(x, dim, group).contiguous()

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group.ops.all_gather(dy, ctx.dim, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return group.ops.all_gather(x, dim, group)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group.ops.shard(dy, ctx.dim, ctx.group).contiguous(), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return group.ops.all_gather(x, dim, group)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group.ops.reduce_scatter(dy, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return group.ops.reduce_scatter(x, dim, group)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.group.ops.all_gather(dy, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, out: Sequence[int] | None, given: Sequence[int] | None
    ) -> torch.Tensor:
        ctx.group, ctx.out, ctx.given = group, out, given
        return group.ops.all_to_all(x, group, out, given)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.group.ops.all_to_all(dy, ctx.group, ctx.given, ctx.out), None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
        ctx.pairs, ctx.group = pairs, group
        return group.ops.permute(x, pairs, group)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        back = [(target, source) for source, target in ctx.pairs]
        return ctx.group.ops.permute(dy, back, ctx.group), None, None


def _run(function: type[torch.autograd.Function], x: torch.Tensor, *args: Any) -> torch.Tensor:
    return cast(torch.Tensor, function.apply(x, *args))


def copy(x: torch.Tensor, group: Group) -> torch.Tensor:
    """x; its gradient is summed over the group."""
    return x if group.size == 1 else _run(_Copy, x, group)


def reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of x over the group; the gradient, alike on all ranks, passes through."""
    return x if group.size == 1 else _run(_Reduce, x, group)


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of x over the group; the gradient is summed too (each rank's loss is a term)."""
    return x if group.size == 1 else _run(_AllReduce, x, group)


def scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """[.., n, ..] from [.., t*n, ..]: this rank's part. Raises ValueError if t does not divide dim."""
    return x if group.size == 1 else _run(_Scatter, x, dim, group)


def gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """[.., t*n, ..] from [.., n, ..]; the gradient, alike on all ranks, is cut."""
    return x if group.size == 1 else _run(_Gather, x, dim, group)


def all_gather(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """[.., t*n, ..] from [.., n, ..]; the gradients of the ranks are summed and cut."""
    return x if group.size == 1 else _run(_AllGather, x, dim, group)


def reduce_scatter(x: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
    """[.., n, ..] from [.., t*n, ..]: the sum over the group, cut. Raises ValueError if t does not divide dim."""
    return x if group.size == 1 else _run(_ReduceScatter, x, dim, group)


def all_to_all(
    x: torch.Tensor, group: Group, output_splits: Sequence[int] | None = None, input_splits: Sequence[int] | None = None
) -> torch.Tensor:
    """Rows input_splits[j] of x to rank j, rows output_splits[j] from rank j, in rank order; equal parts if None.

    Raises ValueError if only one of the two is given, or if equal parts do not come out even.
    """
    if (output_splits is None) != (input_splits is None):
        raise ValueError("all_to_all takes both output_splits and input_splits, or neither")
    return x if group.size == 1 else _run(_AllToAll, x, group, output_splits, input_splits)


def reshard(x: torch.Tensor, from_dim: int, to_dim: int, group: Group) -> torch.Tensor:
    """A part along from_dim becomes a part along to_dim: [.., n, .., t*m, ..] to [.., t*n, .., m, ..]."""
    if group.size == 1:
        return x
    pieces = torch.stack(x.split(equal_part(x, to_dim, group), to_dim))
    return torch.cat(all_to_all(pieces, group).unbind(), from_dim)


def permute(x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
    """x of the rank that is paired, as (source, target), with this one; zeros if none is.

    x has one shape on all ranks. Raises ValueError if a rank is twice a source or twice a target.
    """
    for ends in zip(*pairs, strict=True):
        if len(set(ends)) < len(ends):
            raise ValueError(f"permute: a rank is twice a source or twice a target in {list(pairs)}")
    return _run(_Permute, x, tuple(pairs), group)


def ring(x: torch.Tensor, group: Group, shift: int = 1) -> torch.Tensor:
    """x of the rank `shift` places before this one."""
    if shift % group.size == 0:
        return x
    return permute(x, [(rank, (rank + shift) % group.size) for rank in range(group.size)], group)


def all_reduce_(x: torch.Tensor, group: Group, op: Any = "sum") -> torch.Tensor:
    """x reduced in place, outside autograd. op: "sum", "avg", "max", "min" or lane.premul_sum(factor)."""
    return group.ops.all_reduce_(x, group, op)


def broadcast_(x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
    """x overwritten by that of group rank `source`, outside autograd."""
    return group.ops.broadcast_(x, source, group)


def exchange(sends: Sequence[Send], receives: Sequence[Receive], group: Group) -> Arriving:
    """Point-to-point transfers of a pipeline, all started at once, outside autograd.

    sends     (tensor, group rank that gets it)
    receives  (shape, dtype, group rank that it comes from)
    Between two ranks tensors arrive in the order sent. `.wait()` returns the received tensors.
    """
    return group.ops.exchange(sends, receives, group)
