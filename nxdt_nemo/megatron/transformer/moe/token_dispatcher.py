"""Tokens to their experts and back in tensors whose shapes do not depend on the routing.

Room megatron/. Subclass of megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher; put into MoELayer
by moe_layer.py, on a lane that traces its steps or where the configuration asks for it. Upstream's own path of fixed
shapes drops what does not fit (moe_pad_expert_input_to_capacity); this one runs that path with room for everything.
May import torch and nxdt_nemo.runtime. Proof: tests/megatron/test_moe.py, tests/megatron/test_layouts.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.runtime import current

__all__ = ["ATTRIBUTE", "Bound", "Counts", "StaticTokenDispatcher"]

ATTRIBUTE = "moe_dropless_bound"
PLACE = f"model.mcore_customization_config.{ATTRIBUTE}"


class Counts(tuple[int, ...]):
    """Numbers that the host knows, where upstream has a tensor of them."""

    def tolist(self) -> list[int]:
        """As Tensor.tolist."""
        return list(self)


@dataclass(frozen=True)
class Bound:
    """How many rows each expert has for the tokens of one rank.

    T tokens of a rank, k experts a token, E experts.
      factor    None: T rows. No routing needs more, since the k experts of a token differ.
                f: ceil(f T k / E) rows, f times an even share, at most T. A routing that needs more is an error
      capacity  None, or the configuration's moe_expert_capacity_factor: the router has dropped what exceeds it, and
                as many rows are enough
    """

    factor: float | None = None
    capacity: float | None = None

    @classmethod
    def of(cls, config: Any, ragged: bool) -> Bound | None:
        """What a TransformerConfig asks for in its attribute moe_dropless_bound; None: shapes may follow the routing.

        "worst" or a factor; without one, "worst" on a lane that is not ragged. Raises ConfigError for another value.
        """
        asked, capacity = getattr(config, ATTRIBUTE, None), config.moe_expert_capacity_factor
        if asked is None and ragged:
            return None
        if asked in (None, "worst"):
            return cls(None, capacity)
        if isinstance(asked, bool) or not isinstance(asked, int | float) or not 1 <= asked < math.inf:
            raise ConfigError(f"{asked!r} is not a bound", place=PLACE, fix="use worst, or a factor of at least 1")
        return cls(float(asked), capacity)

    def rows(self, tokens: int, topk: int, experts: int) -> int:
        """See the class."""
        factor = self.factor if self.capacity is None else self.capacity
        return tokens if factor is None else min(tokens, int(get_capacity(tokens * topk, experts, factor)))

    @property
    def may_be_exceeded(self) -> bool:
        """Whether a routing can need more rows."""
        return self.factor is not None and self.capacity is None


class StaticTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Each rank sends each expert the same number of rows; those without a token of its have probability 0.

    T tokens of a rank, E experts, L = E / e of them here (e expert-parallel ranks), t the experts' tensor-parallel
    size, C rows (see Bound), H hidden size.
      sent      [E C, H] and as many probabilities, by one equal all-to-all each; no sizes are exchanged
      computed  [L, e t C, H] flattened: rows that were not routed are computed, and count 0, forward and backward
    With the worst case C = T that is E / k times the work of ragged shapes. Nothing is dropped: a routing that
    exceeds a bound by a factor raises ConfigError: at once, or on a traced lane at the end of the next step, and in any
    case before a checkpoint is written.
    Takes moe_token_dispatcher_type allgather as well as alltoall: the results are the same.
    Signature: MoEAlltoAllTokenDispatcher; its __init__ and bound.
    """

    def __init__(self, bound: Bound, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.bound, self.drop_and_pad = bound, True

    def preprocess(self, routing_map: Tensor) -> Counts:
        """The rows that each local expert gets, in all; routing_map [T, E]."""
        tokens, experts = routing_map.shape
        self.capacity = self.bound.rows(tokens, self.config.moe_router_topk, experts)
        if self.bound.may_be_exceeded and self.capacity < tokens:
            current().defer(partial(self._fits, self.capacity), routing_map.sum(dim=0).max())
        self.num_out_tokens = self.capacity * experts
        return Counts([self.capacity * self.tp_size * self.ep_size] * self.num_local_experts)

    def _fits(self, capacity: int, most: Tensor) -> None:
        if int(most) > capacity:
            reason = f"{getattr(self.config, ATTRIBUTE)} leaves an expert {capacity} rows, and {int(most)} tokens"
            raise ConfigError(f"{reason} of one rank were sent to one", place=PLACE, fix="use worst or a larger factor")
