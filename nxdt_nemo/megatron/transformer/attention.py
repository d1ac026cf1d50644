"""Self-attention with more tensor-parallel ranks than KV heads, one tensor fewer kept when it is recomputed, and a KV
cache of one shape.

Room megatron/. Subclass of megatron.core.transformer.attention.SelfAttention; enters by ModuleSpec, no patch.
Proof: tests/megatron/test_kv_replication.py, test_static_cache.py.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention as _SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import get_pg_size

from nxdt_nemo.megatron.inference.static_cache import StaticCache
from nxdt_nemo.megatron.tensor_parallel.kv_heads import KVHeads
from nxdt_nemo.megatron.tensor_parallel.layers import QKVParallelLinear
from nxdt_nemo.megatron.transformer.dot_product_attention import of_its_own
from nxdt_nemo.runtime.collectives import permute
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.select import current

__all__ = ["SelfAttention"]


class SelfAttention(_SelfAttention):
    """Upstream's, and where a rank would have part of a query group, with a copy of that group's key and value.

    t tensor-parallel ranks, G query groups, t > G: everything is built for t groups, one a rank, out of a copy of the
    config; the config itself keeps its G. The arithmetic is upstream's, for heads / t queries and one key on a rank.
    linear_qkv is a QKVParallelLinear, and linear_proj is cut at the rank's query heads.
    Raises ConfigError naming the keys if t is no multiple of G.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        attn_mask_type: Any = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        model_comm_pgs: Any = None,
    ) -> None:
        group = model_comm_pgs.tp if model_comm_pgs else parallel_state.get_tensor_model_parallel_group(False)
        kv_heads, built_for = KVHeads.of(config, get_pg_size(group)), config
        if kv_heads is not None:
            built_for = copy.copy(config)
            built_for.num_query_groups = kv_heads.ranks
            linear_qkv = ModuleSpec(module=QKVParallelLinear, params={"kv_heads": kv_heads})
            submodules = dataclasses.replace(submodules, linear_qkv=linear_qkv)
        super().__init__(built_for, submodules, layer_number, attn_mask_type, cp_comm_type, model_comm_pgs)
        for module in self.modules():
            if getattr(module, "config", None) is built_for:
                module.config = config
        self._place: int | None = None
        if kv_heads is not None and kv_heads.order != "trn2":
            self._cut_at_heads(kv_heads, current().group_of(group))

    @torch.no_grad()
    def _cut_at_heads(self, kv_heads: KVHeads, group: Group) -> None:
        """Give linear_proj the columns of the heads that this rank has, where these are not in plain order."""
        self._place, weight = kv_heads.place(group.rank), self.linear_proj.weight
        columns = weight.shape[1]
        weight.run = (self._place * columns, (self._place + 1) * columns)
        weight.copy_(permute(weight, [(kv_heads.place(rank), rank) for rank in range(group.size)], group))

    def _checkpointed_attention_forward(self, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        """Upstream's, which keeps what it is given."""
        return super()._checkpointed_attention_forward(query, key, of_its_own(value, query, key), *rest, **named)

    def _adjust_key_value_for_inference(
        self, inference_context: Any, query: Any, key: Any, value: Any, rotary_pos_emb: Any, *rest: Any, **named: Any
    ) -> Any:
        """Upstream's, but for a token that a StaticCache has a place for."""
        if isinstance(inference_context, StaticCache) and inference_context.is_decode_only():
            return inference_context.attend(self.layer_number, query, key, value, rotary_pos_emb)
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *rest, **named
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Upstream's, with linear_proj's columns at the heads that they belong to."""
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._place is not None:
            entry = found[f"{prefix}linear_proj.weight"]
            entry.global_offset = (*entry.global_offset[:-1], self._place * entry.local_shape[-1])
        return found
