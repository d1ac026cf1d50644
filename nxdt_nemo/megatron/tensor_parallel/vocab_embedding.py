"""Word embeddings of a vocabulary that tensor-parallel ranks divide, without writes at indices.

Room megatron/. Stands in for megatron.core.tensor_parallel.layers.VocabParallelEmbedding.forward; construction and
checkpoints stay upstream's. Upstream writes zeros where a boolean mask says, in a tensor whose shape depends on the
data, and has the rank's first id as a number in the graph. May import torch and nxdt_nemo.runtime.
Proof: tests/megatron/test_vocab_embedding.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from nxdt_nemo.runtime.select import current

__all__ = ["first_id", "vocab_parallel_embedding"]


def first_id(part: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """The first of this rank's `part` ids, int64 [1]: from the lane, so that all ranks trace one graph."""
    mine = current().group_of(group)
    return mine.ops.shard(torch.arange(0, part * mine.size, part, device=device), 0, mine)


def vocab_parallel_embedding(self: Any, input_: Tensor) -> Tensor:
    """Rows of the weight by id, summed over the ranks; a rank adds zeros for ids that are not its own.

    B micro-batch, S sequence, V vocabulary, H hidden, t tensor-parallel size.
      input_       [B, S]     int64, global ids
      self.weight  [V/t, H]   this rank's rows
      returns      [B, S, H]; with reduce_scatter_embeddings [S/t, B, H], this rank's part of the sequence
    """
    if self.tp_group.size() == 1:
        rows = _rows(self, input_)
    else:
        part = self.num_embeddings_per_partition
        local = input_ - first_id(part, self.tp_group, input_.device)
        elsewhere = (local < 0) | (local >= part)
        rows = _rows(self, local.masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    if self.reduce_scatter_embeddings:
        whole = rows.transpose(0, 1).contiguous()
        scattered: Tensor = reduce_scatter_to_sequence_parallel_region(whole, group=self.tp_group)
        return scattered
    summed: Tensor = reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
    return summed


def _rows(self: Any, ids: Tensor) -> Tensor:
    found: Tensor = self.weight[ids] if self.deterministic_mode else F.embedding(ids, self.weight)
    return found
