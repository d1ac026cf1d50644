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
from torch.autograd.function import once_differentiable

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
    if self.deterministic_mode:
        return self.weight[ids]  # type: ignore[no-any-return]
    if getattr(self, "gradient_accumulation_fusion", False) and current().ragged and _adds_to_main_grad(self.weight):
        found: Tensor = _Rows.apply(ids, self.weight)  # type: ignore[no-untyped-call]
        return found
    return F.embedding(ids, self.weight)


def _adds_to_main_grad(weight: Tensor) -> bool:
    """Has the weight a float32 buffer of gradients, and megatron-core's flag that says a gradient is there already? A
    tied weight's gradient comes from two places, and its flag says that the other one's has to be added."""
    main_grad: Any = getattr(weight, "main_grad", None)
    flagged = main_grad is not None and hasattr(weight, "grad_added_to_main_grad")
    alone = not getattr(weight, "zero_out_wgrad", False) and not weight._backward_hooks
    return bool(flagged and alone and main_grad.dtype == torch.float32)


class _Rows(torch.autograd.Function):
    """An embedding whose gradient touches the rows that it has, in main_grad: torch's is a tensor of the weight's size,
    of zeros for the most part, that is written once and read once more. As what upstream's linear layers do under
    `gradient_accumulation_fusion`, with the same limits: autograd has no gradient of this weight to hand to others.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        [ids], weight = ctx.saved_tensors, ctx.weight
        if not ctx.needs_input_grad[1]:
            return None, None
        main_grad = weight.main_grad
        main_grad.index_add_(0, ids.flatten(), grad.reshape(-1, grad.shape[-1]).to(main_grad.dtype))
        weight.grad_added_to_main_grad = True
        return None, torch.empty_like(weight)  # as upstream's fused linear layers: for the hooks, nobody reads it
