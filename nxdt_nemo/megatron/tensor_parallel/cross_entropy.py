"""Cross entropy over a vocabulary that tensor-parallel ranks divide, in two passes over the logits.

Room megatron/. Wraps megatron.core.tensor_parallel.cross_entropy.vocab_parallel_cross_entropy and replaces
megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy (whose gradient is rounded to bfloat16,
whatever the logits are). May import torch, upstream's parallel state and nxdt_nemo.runtime.
Proof: tests/megatron/test_cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor

from nxdt_nemo.apex._kernels.lists import TRACED_DEVICES
from nxdt_nemo.megatron.tensor_parallel.vocab_embedding import first_id

__all__ = ["fused_vocab_parallel_cross_entropy", "vocab_parallel_cross_entropy"]

# Rows that are worked on at once, in elements: an eager CPU then finds them in its cache again. A compiler that
# traces the whole fuses by itself.
_BLOCK = 1 << 19
_BLOCKED_DEVICES = frozenset({"cpu"})


def vocab_parallel_cross_entropy(
    original: Callable[..., Tensor], vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """See _CrossEntropy; with label smoothing it is upstream's own."""
    if label_smoothing > 0:
        return original(vocab_parallel_logits, target, label_smoothing)
    return fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, get_tensor_model_parallel_group())


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
    """See _CrossEntropy."""
    loss: Tensor = _CrossEntropy.apply(vocab_parallel_logits, target, tp_group)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """log(sum(exp(logits))) - logits[target], for each token.

    S sequence, B micro-batch, V vocabulary, t tensor-parallel size.
      logits   [S, B, V/t]  any float dtype; float32 ones are overwritten, as upstream does, unless steps are traced
      target   [S, B]       int64, global ids
      returns  [S, B]       float32
    Saves one float32 tensor of the logits' size, which becomes the gradient. All-reduces [S, B] three times.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any) -> Tensor:
        dtype, logits = logits.dtype, logits.float()
        rows = logits.view(-1, logits.shape[-1])
        largest = rows.amax(-1, keepdim=True)
        _reduce(largest, dist.ReduceOp.MAX, group)
        index = target.reshape(-1, 1) - first_id(rows.shape[1], group, target.device)
        elsewhere = (index < 0) | (index >= rows.shape[1])
        index = index.masked_fill(elsewhere, 0)
        chosen = (rows.gather(1, index) - largest).masked_fill(elsewhere, 0.0)
        if rows.device.type in TRACED_DEVICES:
            rows = (rows - largest).exp()
            logits, total = rows.view_as(logits), rows.sum(-1, keepdim=True)
        else:
            total = torch.empty_like(largest)
            for block, shift, sums in _blocks(rows, largest, total):
                torch.sum(block.sub_(shift).exp_(), -1, keepdim=True, out=sums)
        _reduce(chosen, dist.ReduceOp.SUM, group)
        _reduce(total, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(logits, total, index, elsewhere)
        ctx.dtype = dtype
        # No view: upstream's schedules scale a loss in place, which autograd refuses for views made in here.
        return total.view(target.shape).log() - chosen.view(target.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        exponents, total, index, elsewhere = ctx.saved_tensors
        gradient = grad_outputs[0].reshape(-1, 1)
        rows, amount = exponents.view(-1, exponents.shape[-1]), gradient.masked_fill(elsewhere, 0.0)
        if rows.device.type in TRACED_DEVICES:
            rows = rows * (gradient / total) - _at(index, rows, amount)
        elif rows.device.type in _BLOCKED_DEVICES:
            rows.mul_(gradient / total).scatter_add_(1, index, amount.neg())
        else:
            rows.mul_(gradient / total).sub_(_at(index, rows, amount))
        return rows.view_as(exponents).to(ctx.dtype), None, None


def _at(index: Tensor, rows: Tensor, amount: Tensor) -> Tensor:
    """amount[i] at [i, index[i]], else 0, like `rows`: a mask, which a compiler fuses, and no write at an index.

    Places are numbered by 256: torch_xla makes a range on the host, number by number, and puts it into the graph.
    """
    count = rows.shape[1]
    first, rest = (torch.arange(size, device=rows.device) for size in (-(-count // 256), 256))
    places = (first.unsqueeze(1) * 256 + rest).flatten()[:count]
    return torch.where(places == index, amount, 0.0)


def _reduce(tensor: Tensor, op: Any, group: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, some at a time."""
    first = tensors[0]
    if first.device.type not in _BLOCKED_DEVICES:
        yield tensors
        return
    yield from zip(*(tensor.split(max(1, _BLOCK // first.shape[1])) for tensor in tensors), strict=True)
