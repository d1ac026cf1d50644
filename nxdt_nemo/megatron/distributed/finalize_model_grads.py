"""Gradients of KV heads that tensor-parallel ranks have copies of: summed over the copies, once a step.

Room megatron/. Wraps megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads, which
does the like for norms; loops that do without finalize_model_grads (NeMo's own reductions) call it as the config's
finalize_model_grads_func, which is that where none is named. Proof: tests/megatron/test_kv_replication.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from nxdt_nemo.errors import NotOnNeuron
from nxdt_nemo.megatron.tensor_parallel.kv_heads import KVHeads
from nxdt_nemo.runtime.collectives import all_reduce_
from nxdt_nemo.runtime.groups import Group, completed
from nxdt_nemo.runtime.select import current

__all__ = ["allreduce_non_tensor_model_parallel_grads", "sum_kv_copies"]

# By tensor-parallel group, so that a new parallel state makes new ones.
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[KVHeads, Group]] = WeakKeyDictionary()


def allreduce_non_tensor_model_parallel_grads(original: Callable[..., None], model: list[Any], config: Any) -> None:
    """Upstream's reductions after those of the data-parallel ranks, and sum_kv_copies."""
    original(model, config)
    sum_kv_copies(model)


@torch.no_grad()
def sum_kv_copies(model: Sequence[Any], num_tokens: Any = None) -> None:
    """Sum each KV head's gradients, in place, over the ranks that have a copy of it.

    model        model chunks; their gradients are in main_grad where they have one, else in grad
    num_tokens   unused: the signature is that of finalize_model_grads
    It does not matter whether they were reduced over the data-parallel ranks before: a rank has the same part of the
    same parameters as the ranks it sums with. All ranks of the world call it. Bytes received a rank: for n bytes of
    gradients on c copies 2 n (c - 1) / c.
    """
    heads = KVHeads.of(get_model_config(model[0]), parallel_state.get_tensor_model_parallel_world_size())
    if heads is None:
        return
    group = _replicas(heads)
    for param in (param for chunk in model for param in chunk.parameters() if hasattr(param, "kv_heads")):
        if param.kv_heads != heads:
            raise NotOnNeuron("num_query_groups that differ between layers, with copies of KV heads")
        grad = param.main_grad if hasattr(param, "main_grad") else param.grad
        if param.requires_grad and grad is not None:
            all_reduce_(grad, group)


def _replicas(heads: KVHeads) -> Group:
    """The ranks that have the same KV head as this one; made with all such groups of the world at the first call."""
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    known = _groups.setdefault(tensor_parallel, {})
    if heads not in known:
        peers = (ranks for ranks in current().group_of(tensor_parallel).mesh if len(ranks) == heads.ranks)
        mesh = [[ranks[place] for place in holders] for ranks in peers for holders in heads.holders()]
        known[heads] = current().groups(completed(mesh, dist.get_world_size()), "kv copies")
    return known[heads]
