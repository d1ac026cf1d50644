"""A mixture of experts with fixed shapes where they are needed, and with mixed tokens where they are asked for.

Room megatron/. Wraps __init__ and forward of megatron.core.transformer.moe.moe_layer.MoELayer: a class of ours in its
place would not get the process groups, which TransformerLayer hands to upstream's class only. What it does and when:
docs/moe.md. Proof: tests/megatron/test_moe.py, tests/megatron/test_token_shuffle.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_utils import get_default_model_comm_pgs
from torch import Tensor

from nxdt_nemo.megatron.transformer.moe.token_dispatcher import Bound, StaticTokenDispatcher
from nxdt_nemo.megatron.transformer.moe.token_shuffle import shuffle, shuffle_group, unshuffle
from nxdt_nemo.runtime import current

__all__ = ["forward", "init"]


def init(
    original: Callable[..., None],
    self: Any,
    config: Any,
    submodules: Any = None,
    layer_number: int | None = None,
    model_comm_pgs: Any = None,
) -> None:
    """Upstream's, then its token dispatcher exchanged if the lane or the configuration wants fixed shapes."""
    groups = model_comm_pgs if model_comm_pgs is not None else get_default_model_comm_pgs()
    original(self, config, submodules, layer_number, groups)
    self.token_shuffle_group = shuffle_group(config)
    bound = Bound.of(config, current().ragged)
    if bound is None:
        return
    overlapped = self.token_dispatcher.shared_experts
    self.token_dispatcher = StaticTokenDispatcher(
        bound, self.num_local_experts, self.local_expert_indices, config=config, model_comm_pgs=groups
    )
    self.token_dispatcher.shared_experts = overlapped


def forward(original: Callable[..., Any], self: Any, hidden_states: Tensor) -> Any:
    """Upstream's of [S, B, H]; in training on tokens that were mixed with those of other ranks, if so configured."""
    if self.token_shuffle_group is None or not self.training:
        return original(self, hidden_states)
    mixed, back = shuffle(hidden_states, self.token_shuffle_group)
    output, bias = original(self, mixed)
    return unshuffle(output, back, self.token_shuffle_group), bias
