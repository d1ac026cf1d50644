"""Core attention: softmax(Q K^T / sqrt(d)) V, by the implementation that suits the call.

Room megatron/. Subclass of megatron.core.transformer.dot_product_attention.DotProductAttention; enters by
ModuleSpec, no patch. Takes what upstream has in TEDotProductAttention only: context parallelism, packed sequences,
`window_size` and an additive bias; and ALiBi, which NeMo's legacy models have.
Which implementation: attention_choice.py, docs/attention.md.
Proof: tests/megatron/test_attention.py, test_attention_choice.py, test_alibi.py, test_context_parallel.py,
test_parity.py.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention as _DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nxdt_nemo.megatron.tensor_parallel.kv_heads import KVHeads
from nxdt_nemo.megatron.transformer import context_parallel, nki_flash
from nxdt_nemo.megatron.transformer.alibi import slopes_of
from nxdt_nemo.megatron.transformer.attention_choice import Call, choose
from nxdt_nemo.megatron.transformer.blocked_attention import Rule, blocked_attention
from nxdt_nemo.megatron.transformer.packed_sequences import chunks_of, local_order, segments_of
from nxdt_nemo.runtime.select import current

__all__ = ["DotProductAttention", "of_its_own"]


class DotProductAttention(_DotProductAttention):
    """Upstream's attention, without its [b, n, s, s] scores where the result is the same without them.

    What upstream's own code computes stays to the bit upstream's as long as the sequence is short: a mask of the
    caller's, which fills with -10000 (a row that is hidden altogether attends to all), and dropout, whose random
    numbers a resumed run must draw as the first one did. There the softmax is plain torch, whatever
    `masked_softmax_fusion` says. Arguments as upstream. With config.position_embedding_type "alibi" (which upstream's
    GPTModel reads there too, and takes for no positions) distances are taken from the scores, by alibi.py.
    """

    # The last mask that was found to be causal: all layers of a micro-batch are handed the same one.
    _causal_mask: ClassVar[weakref.ref[Tensor] | None] = None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        model_comm_pgs: Any = None,
        *,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        """As upstream, and with what latent attention hands to TransformerEngine's: features of a key and a value."""
        modest = copy.copy(config)  # upstream's constructor asserts that nobody asks for these
        modest.context_parallel_size, modest.window_size = 1, None
        super().__init__(
            modest, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type,
            model_comm_pgs,
        )  # fmt: skip
        self.config = config
        self.scale_mask_softmax.scaled_masked_softmax_fusion = False
        self.cp_comm_type = cp_comm_type or "p2p"
        self.cp_group: Any = _cp_group(model_comm_pgs) if config.context_parallel_size > 1 else None
        self._tp_group: Any = getattr(model_comm_pgs, "tp", None)
        self._self_attention = attention_type == "self"
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """S queries, T keys, B micro-batch, N heads, G query groups (each a rank's own), D features a head.

        query            [S, B, N, D]; key, value [T, B, G, D]; any strides; packed: [S, N, D] and [T, G, D]; a value
                         may have another D
        attention_mask   bool, broadcast to [B, N, S, T]; True hides
        attention_bias   [B or 1, N or 1, S, T], added to the scaled scores
        packed_seq_params  its qkv_format is "thd"
        returns          [S, B, N * D], D the value's; packed: [S, N * D]
        With context parallelism S and T are this rank's tokens, in Megatron's order (packed_sequences.py).
        Raises ConfigError for what no implementation has, AssertionError for what upstream refuses.
        """
        if packed_seq_params is not None and packed_seq_params.qkv_format != "thd":
            return self._upstream(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        packed = packed_seq_params
        if packed is not None:  # what the lengths say is all there is to say
            query, key, value, attention_mask = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), None
        value = of_its_own(value, query, key)
        if attention_mask is not None and self.config.context_parallel_size > 1 and self._is_causal(False):
            attention_mask = self._beyond_causal(attention_mask)
        call = self._call(query, key, value, attention_mask, attention_bias, packed)
        name = choose(call).name
        if name == "upstream":
            mask = self._mask(call, packed, attention_mask, query.device)
            context = self._upstream(query, key, value, mask, attn_mask_type, attention_bias, None)
        else:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            rule = self._rule(call, attention_mask)
            with self._draws(call):
                if call.parts > 1:
                    context = self._distributed(call, query, key, value, rule, packed)
                else:
                    rule = replace(rule, segments=_segments(call, packed))
                    context = self._local(name, query, key, value, rule, attention_bias)
            context = context.permute(2, 0, 1, 3).flatten(2)
        return context.squeeze(1) if packed is not None else context

    def _upstream(self, *arguments: Any) -> Tensor:
        context: Tensor = super().forward(*arguments)
        return context

    def _call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, packed: Any
    ) -> Call:
        return Call(
            lane=current().name,
            dtype=query.dtype,
            queries=query.shape[0],
            keys=key.shape[0],
            heads=query.shape[2],
            groups=key.shape[2],
            features=query.shape[3],
            values=value.shape[3],
            causal=mask is None and self._is_causal(packed is not None),
            masked=mask is not None,
            biased=bias is not None,
            alibi=self._alibi,
            packed=packed is not None,
            window=self.config.window_size is not None,
            dropout=self.training and self.attention_dropout.p > 0.0,
            parts=self.config.context_parallel_size,
            comm=self.cp_comm_type,
        )

    def _draws(self, call: Call) -> AbstractContextManager[None]:
        """The stream that drops probabilities, as upstream: a rank's own among those that cut the heads. With sequence
        parallelism the whole block draws from it already."""
        if not call.dropout or self.config.sequence_parallel:
            return nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork

    def _is_causal(self, packed: bool) -> bool:
        """Upstream's softmax looks at the type it was built with, not at the one in the call; and of the types that
        TransformerEngine has besides, it hides nothing for padding_causal."""
        mask_type, beyond = self.scale_mask_softmax.attn_mask_type, packed or self.config.context_parallel_size > 1
        return mask_type == AttnMaskType.causal or (mask_type == AttnMaskType.padding_causal and beyond)

    def _beyond_causal(self, mask: Tensor) -> Tensor | None:
        """None for the mask that a causal layer has anyway, which Megatron-LM's loader hands to every layer.

        mask  [B or 1, 1, S / p, S], this rank's queries in Megatron's order
        Under context parallelism TransformerEngine goes by the layer's type and never looks at a mask. A traced lane
        cannot look either; elsewhere one that hides more (--reset-attention-mask) stays, and is refused.
        """
        known = DotProductAttention._causal_mask
        if current().traced or (known is not None and known() is mask):
            return None
        parts, (rows, columns) = self.config.context_parallel_size, mask.shape[-2:]
        if rows * parts != columns:
            return mask
        chunks = chunks_of(None, None, rows // 2, parts, mask.device).positions
        rank = current().group_of(self.cp_group).rank
        mine = torch.cat((chunks[rank], chunks[2 * parts - 1 - rank]))
        if not torch.equal(mask, (torch.arange(columns, device=mask.device) > mine.unsqueeze(1)).expand_as(mask)):
            return mask
        DotProductAttention._causal_mask = weakref.ref(mask)
        return None

    def _rule(self, call: Call, mask: Tensor | None) -> Rule:
        """Bounds and the caller's mask. Under a causal layer a window looks back only, as in TransformerEngine."""
        left, right = self.config.window_size or (-1, -1)
        causal = call.causal or (call.window and self._is_causal(call.packed))
        return Rule(
            int(left),
            0 if causal else int(right),
            offset=call.keys - call.queries,
            hidden=mask,
            slopes=self._slopes() if call.alibi else None,
            dropout=self.attention_dropout.p if call.dropout else 0.0,
        )

    def _mask(self, call: Call, packed: Any, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Everything that is hidden, for upstream's own code: [1, 1, S, T] or as the caller's mask."""
        if packed is None and not call.window:
            return mask
        rule = replace(self._rule(call, mask), segments=_segments(call, packed))
        unseen = rule.unseen(slice(0, call.queries), slice(0, call.keys), device)
        if unseen is None:
            return mask
        return unseen[None, None] if mask is None else unseen | mask

    def _local(self, name: str, query: Tensor, key: Tensor, value: Tensor, rule: Rule, bias: Tensor | None) -> Tensor:
        """[B, N, S, E] on this rank alone."""
        if name == "sdpa":
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self._scale, enable_gqa=grouped
            )
        if name == "nki_flash":
            return nki_flash.flash_attention(query, key, value, self._scale)
        return blocked_attention(query, key, value, rule, self._scale, bias)

    def _distributed(self, call: Call, query: Tensor, key: Tensor, value: Tensor, rule: Rule, packed: Any) -> Tensor:
        """[B, N, L, E] of this rank's L tokens."""
        group = current().group_of(self.cp_group)
        assert group.size == call.parts, f"context_parallel_size is {call.parts}, its group has {group.size} ranks"
        starts, ends = (None, None) if packed is None else _bounds(packed.cu_seqlens_q, packed.cu_seqlens_q_padded)
        chunks = chunks_of(starts, ends, call.queries // 2, call.parts, query.device)
        order = None if starts is None else local_order(starts, call.queries // 2, call.parts)
        if order is not None:
            query, key, value = (x.index_select(2, order.to_chunks) for x in (query, key, value))
        if call.comm == "a2a":
            context = context_parallel.all_to_all_attention(query, key, value, rule, self._core(call), chunks, group)
        else:
            run = context_parallel.ring_attention if call.comm == "p2p" else context_parallel.all_gather_attention
            context = run(query, key, value, rule, self._scale, chunks, group)
        return context if order is None else context.index_select(2, order.to_thd)

    def _core(self, call: Call) -> context_parallel.Core:
        """Attention over all tokens of this rank's heads, by what suits that call."""
        parts = call.parts
        inner = replace(
            call, parts=1, queries=call.queries * parts, keys=call.keys * parts, heads=call.heads // parts,
            groups=call.groups // parts,
        )  # fmt: skip
        name = choose(inner).name
        if name == "upstream":  # no scores are made whole here
            name = "blocked"
        return lambda query, key, value, rule: self._local(name, query, key, value, rule, None)

    @property
    def _alibi(self) -> bool:
        return self._self_attention and getattr(self.config, "position_embedding_type", None) == "alibi"

    def _slopes(self) -> Tensor:
        """Of this rank's heads, float32 [N]."""
        lane = current()
        group = lane.group_of(self._tp_group or parallel_state.get_tensor_model_parallel_group())
        whole, kv_heads = slopes_of(self.config.num_attention_heads, lane.device()), KVHeads.of(self.config, group.size)
        if kv_heads is not None:
            parts = whole.chunk(group.size)
            whole = torch.cat([parts[kv_heads.place(rank)] for rank in range(group.size)])
        return lane.shard(whole, 0, group)

    @property
    def _scale(self) -> float:
        # Upstream divides the scores by the layer's number (apply_query_key_layer_scaling) and its softmax
        # multiplies them again.
        return float(self.softmax_scale * (self.scale_mask_softmax.scale or 1.0))


def of_its_own(value: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The value, no longer as a view of a fused projection if query and key no longer are (rotated, normalized).

    Kept for the backward pass, such a view holds all of the projection's [S, B, (N + 2 G) D].
    """
    return value.contiguous() if query.is_contiguous() and key.is_contiguous() else value


def _cp_group(model_comm_pgs: Any) -> Any:
    given = getattr(model_comm_pgs, "cp", None)
    return parallel_state.get_context_parallel_group() if given is None else given


def _bounds(lengths: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where sequences begin in memory, and their cumulative true lengths where these are smaller."""
    return (lengths, None) if padded is None else (padded, lengths)


def _segments(call: Call, packed: Any) -> tuple[Tensor, Tensor] | None:
    if packed is None:
        return None
    queries = segments_of(*_bounds(packed.cu_seqlens_q, packed.cu_seqlens_q_padded), call.queries)[0]
    return queries, segments_of(*_bounds(packed.cu_seqlens_kv, packed.cu_seqlens_kv_padded), call.keys)[1]
