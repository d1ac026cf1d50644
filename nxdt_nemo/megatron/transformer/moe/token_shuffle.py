"""Tokens of several data-parallel ranks mixed before they are routed, and put back after.

Room megatron/. Has no counterpart in megatron-core; neuronx-distributed's modules/moe/token_shuffling.py is the model.
The tokens of a sequence resemble each other, so that a rank's own fill some experts' capacity and leave others empty.
Called by moe_layer.py. May import torch and nxdt_nemo.runtime. Proof: tests/megatron/test_token_shuffle.py.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.runtime import current
from nxdt_nemo.runtime.collectives import all_to_all
from nxdt_nemo.runtime.groups import Group

__all__ = ["ATTRIBUTE", "shuffle", "shuffle_group", "unshuffle"]

ATTRIBUTE = "token_shuffle_group_size"
PLACE = f"model.mcore_customization_config.{ATTRIBUTE}"

# By data-parallel group, so that a new parallel state makes new ones.
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[int, Group]] = WeakKeyDictionary()


def shuffle_group(config: Any) -> Group | None:
    """The ranks that this one mixes its tokens with; None where the configuration does not say so.

    A TransformerConfig's attribute token_shuffle_group_size, 1 without one: so many neighbours of a data-parallel
    group. All ranks of the world make the groups together at the first call. Raises ConfigError if it does not divide
    the data-parallel size, or with seq_aux_loss, which is about whole sequences.
    """
    size = getattr(config, ATTRIBUTE, 1)
    if size == 1:
        return None
    data_parallel = parallel_state.get_data_parallel_group()
    ranks = dist.get_world_size(data_parallel)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or ranks % size:
        reason = f"{size!r} does not divide the {ranks} data-parallel ranks"
        raise ConfigError(reason, place=PLACE, fix="use a divisor, or 1 for none")
    if config.moe_router_load_balancing_type == "seq_aux_loss":
        reason = f"{size} mixes sequences, and moe_router_load_balancing_type=seq_aux_loss balances each"
        raise ConfigError(reason, place=PLACE, fix="use aux_loss, or 1 for no mixing")
    known = _groups.setdefault(data_parallel, {})
    if size not in known:
        known[size] = _neighbours(data_parallel, size)
    return known[size]


def _neighbours(data_parallel: dist.ProcessGroup, size: int) -> Group:
    """By upstream's create_group, which keeps the members' order under a placement, and which the lane notes."""
    lane = current()
    mesh = lane.group_of(data_parallel).mesh
    parts = [ranks[start : start + size] for ranks in mesh for start in range(0, len(ranks), size)]
    made = {part: parallel_state.create_group(list(part), group_desc="token shuffle") for part in parts}
    return lane.group_of(next(group for part, group in made.items() if dist.get_rank() in part))


def shuffle(x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """x [S, B, H] with an equal part of each rank's tokens, drawn at random; and what unshuffle needs.

    The order is drawn on the host from torch's own random stream, which checkpoints save and recomputation sets back,
    and turned round there: sorting falls off XLA.
    Bytes received a rank, n = S B H itemsize: forward n (g - 1) / g for g ranks, backward the same.
    Raises ConfigError if g does not divide S B. Paper: Lewis et al. 2021, arXiv:2103.16716, section 3.1.
    """
    tokens = x.flatten(0, -2)
    if tokens.shape[0] % group.size:
        reason = f"{group.size} does not divide the {tokens.shape[0]} tokens of a rank"
        raise ConfigError(reason, place=PLACE, fix="use a divisor, or 1 for none")
    order = torch.randperm(tokens.shape[0])
    mixed = tokens.index_select(0, order.to(x.device))
    return all_to_all(mixed, group).view(x.shape), order.argsort().to(x.device)


def unshuffle(x: Tensor, back: Tensor, group: Group) -> Tensor:
    """The tokens [S, B, H] in the places that shuffle took them from; back is what it gave."""
    tokens = all_to_all(x.flatten(0, -2), group)  # equal parts: the exchange is its own inverse
    return tokens.index_select(0, back).view(x.shape)
