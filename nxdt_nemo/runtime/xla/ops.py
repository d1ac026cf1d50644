"""The lane's collectives between processes on XLA:CPU.

Room runtime/. Imports torch and torch_xla. Proof: tests/runtime/test_xla.py, tests/megatron/test_xla.py.

A group of one rank needs none. Others, since XLA:CPU's client sees a world of one: the graph is cut, and host copies go
through the cpu lane's table. Collectives inside the graph, which a device has: in_graph.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm

from nxdt_nemo.runtime import gloo
from nxdt_nemo.runtime.gaps import PremulSum
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.ops import Arriving, Ops, Receive, Send
from nxdt_nemo.runtime.select import current

__all__ = ["cut", "hand_over", "hosted", "table"]


def hand_over(instead: Callable[[], None] | None) -> None:
    """Run what was traced, or what the lane has in place of that."""
    if instead is not None:
        instead()
    else:
        torch_xla.sync()


def cut() -> None:
    """Hand over what was traced. torch_xla moves its random state on when it does, from the last one that was set: here
    it stays, or numbers would depend on where graphs are cut and on what is recomputed."""
    state = xm.get_rng_state()
    hand_over(current().on_cut)  # type: ignore[attr-defined]
    xm.set_rng_state(state)


def table(between: Ops) -> Ops:
    """A new table: `between` for groups of several ranks, nothing to send in a group of one."""

    def or_alone(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            return x if _group(rest).size == 1 else operation(x, *rest)

        return call

    def all_reduce_(x: torch.Tensor, group: Group, op: Any = "sum") -> torch.Tensor:
        if group.size > 1:
            return between.all_reduce_(x, group, op)
        return x.mul_(op.factor) if isinstance(op, PremulSum) else x

    def permute(x: torch.Tensor, pairs: Sequence[tuple[int, int]], group: Group) -> torch.Tensor:
        if group.size > 1:
            return between.permute(x, pairs, group)
        return x if (0, 0) in pairs else torch.zeros_like(x)

    return Ops(
        all_reduce_=all_reduce_,
        broadcast_=or_alone(between.broadcast_),
        all_gather=or_alone(between.all_gather),
        reduce_scatter=or_alone(between.reduce_scatter),
        all_to_all=or_alone(between.all_to_all),
        permute=permute,
        exchange=between.exchange,
        shard=or_alone(between.shard),
    )


def _group(arguments: tuple[Any, ...]) -> Group:
    return next(one for one in arguments if isinstance(one, Group))


def hosted() -> Ops:
    """gloo, on host copies."""
    inner = gloo.table()

    def through(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            return operation(_host(x), *rest).to(x.device)

        return call

    def in_place(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            return x.copy_(operation(_host(x), *rest))

        return call

    def exchange(sends: Sequence[Send], receives: Sequence[Receive], group: Group) -> Arriving:
        arriving = inner.exchange([(_host(tensor), peer) for tensor, peer in sends], receives, group)
        return _Arriving(arriving, torch_xla.device())

    return Ops(
        all_reduce_=in_place(inner.all_reduce_),
        broadcast_=in_place(inner.broadcast_),
        all_gather=through(inner.all_gather),
        reduce_scatter=through(inner.reduce_scatter),
        all_to_all=through(inner.all_to_all),
        permute=through(inner.permute),
        exchange=exchange,
        shard=inner.shard,
    )


@dataclass(frozen=True)
class _Arriving:
    """Host tensors under way, which go on to the device."""

    hosts: Arriving
    device: torch.device

    def wait(self) -> list[torch.Tensor]:
        return [host.to(self.device) for host in self.hosts.wait()]


def _host(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the host. The graph is cut first: a copy alone would compile what only it needs."""
    cut()
    return x.detach().cpu().contiguous()
