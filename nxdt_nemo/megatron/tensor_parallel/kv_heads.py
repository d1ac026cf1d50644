"""Which heads a tensor-parallel rank has when there are more ranks than KV heads, so that these have copies.

Room megatron/. Has no counterpart upstream, which refuses the case; neuronx-distributed has it as `kv_replicator` and
`kv_size_multiplier`. No torch. Proof: tests/megatron/test_kv_replication.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from nxdt_nemo.errors import ConfigError

__all__ = ["HeadOrder", "KVHeads"]

HeadOrder = Literal["trn2", "trn1"]


@dataclass(frozen=True)
class KVHeads:
    """t ranks for G query groups, t a multiple of G: rank by rank one KV head, of which there are t / G copies.

    heads    query heads, a multiple of t
    groups   query groups G, each with one KV head
    ranks    tensor-parallel size t
    order    trn2: copies on neighbouring ranks, the heads in plain order; trn1: rank r has KV head r mod G.
             Of 8 heads and 2 groups on 8 ranks: Q 0,1,2,3,4,5,6,7, K 0,0,0,0,1,1,1,1, or Q 0,4,1,5,2,6,3,7,
             K 0,1,0,1,0,1,0,1.
    """

    heads: int
    groups: int
    ranks: int
    order: HeadOrder = "trn2"

    @classmethod
    def of(cls, config: Any, ranks: int) -> KVHeads | None:
        """For a TransformerConfig, None where each rank has whole groups.

        The order is the attribute `kv_head_order` of the config, which is trn2 without one. Raises ConfigError
        naming the keys if the heads cannot be laid out.
        """
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        if groups % ranks == 0:
            return None
        if ranks % groups or heads % groups or heads % ranks:
            raise ConfigError(
                f"tensor_model_parallel_size={ranks} and num_query_groups={groups} of "
                f"num_attention_heads={heads} do not fit",
                fix="use a size that divides the heads, and divides the groups or is a multiple of them",
            )
        order: Any = getattr(config, "kv_head_order", "trn2")
        if order not in get_args(HeadOrder):
            raise ConfigError(f"kv_head_order={order!r} is not known", fix="use 'trn2' or 'trn1'")
        return cls(heads, groups, ranks, order)

    @property
    def copies(self) -> int:
        """Of each KV head."""
        return self.ranks // self.groups

    def group(self, rank: int) -> int:
        """The query group that a rank's heads are of."""
        return rank // self.copies if self.order == "trn2" else rank % self.groups

    def copy(self, rank: int) -> int:
        """Which of the copies of its KV head a rank has."""
        return rank % self.copies if self.order == "trn2" else rank // self.groups

    def place(self, rank: int) -> int:
        """The rank that has these query heads in plain order: what of the output projection's columns is its."""
        return self.group(rank) * self.copies + self.copy(rank)

    def holders(self) -> list[list[int]]:
        """The ranks that have a copy, for each KV head, ascending."""
        return [[rank for rank in range(self.ranks) if self.group(rank) == group] for group in range(self.groups)]

    def query_run(self, rank: int) -> tuple[int, int]:
        """A rank's query heads, first and last + 1, in the fused projection, where a group is [queries, key, value]."""
        each = self.heads // self.ranks
        first = self._first(rank) + self.copy(rank) * each
        return first, first + each

    def kv_run(self, rank: int) -> tuple[int, int]:
        """A rank's key and value head, as query_run."""
        first = self._first(rank) + self.heads // self.groups
        return first, first + 2

    def _first(self, rank: int) -> int:
        return self.group(rank) * (self.heads // self.groups + 2)
