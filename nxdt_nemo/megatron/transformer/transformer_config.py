"""What a TransformerConfig accepts: more tensor-parallel ranks than query groups, and TransformerEngine's kernels, too.

Room megatron/. Wraps megatron.core.transformer.transformer_config.TransformerConfig.__post_init__.
Proof: tests/megatron/test_kv_replication.py, test_transformer_engine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nxdt_nemo.megatron.distributed.finalize_model_grads import sum_kv_copies
from nxdt_nemo.megatron.tensor_parallel.kv_heads import KVHeads

__all__ = ["post_init"]


def post_init(original: Callable[[Any], None], self: Any) -> None:
    """Upstream's, which sees as many query groups as ranks where KV heads are copied; the config keeps its own number.

    Such a config sums the copies' gradients where the training loop names no finalize_model_grads_func of its own.
    Raises ConfigError naming the keys where copies do not come out even (upstream's ValueError for the heads).
    Where TransformerEngine's kernel is asked for, megatron-core's own code does the same.
    """
    self.moe_permute_fusion = False
    if self.cross_entropy_fusion_impl == "te":
        self.cross_entropy_fusion_impl = "native"
    ranks, groups = self.tensor_model_parallel_size, self.num_query_groups
    if self.num_attention_heads % ranks or KVHeads.of(self, ranks) is None:
        original(self)
        return
    self.num_query_groups = ranks
    original(self)
    self.num_query_groups = groups
    self.finalize_model_grads_func = self.finalize_model_grads_func or sum_kv_copies
