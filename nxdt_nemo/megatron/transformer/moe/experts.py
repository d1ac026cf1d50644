"""A rank's experts in two parameters, computed together.

Room megatron/. Subclass of megatron.core.transformer.moe.experts.GroupedMLP, whose products are a CUTLASS kernel;
enters by ModuleSpec, where the configuration says moe_grouped_gemm. Parameters, initialisation and checkpoints are
upstream's: a distributed checkpoint has the keys and shapes of SequentialMLP's, one matrix an expert.
May import torch and nxdt_nemo.megatron. Proof: tests/megatron/test_moe.py, tests/megatron/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import custom_bwd, custom_fwd
from megatron.core.transformer.moe.experts import GroupedMLP as _GroupedMLP
from torch import Tensor

from nxdt_nemo.megatron.tensor_parallel.layers import stand_in_gradient

__all__ = ["GroupedMLP"]


class GroupedMLP(_GroupedMLP):
    """y = act(x W1) p W2 for each expert's rows x, of which one after another has its own.

    E experts of this rank, H hidden size, F the feed-forward size of this rank's tensor-parallel part, G 2 for a gated
    activation, else 1.
      weight1  [H, E G F]; its memory is [E, H, G F]. weight2 [E F, H]; its memory is [E, F, H]
      x        [N, H], sorted by expert; N may be 0
      counts   the E numbers of rows, on the host, of sum N
      p        [N], the router's probabilities
      returns  [N, H], a term of the sum over tensor-parallel ranks; and None
    Where all experts have as many rows (a capacity or a bound that is filled up), their products are one batched
    product of fixed shape; else one product an expert. With gradient_accumulation_fusion the weights' gradients are
    added to main_grad by their products. recompute_modules "moe_act" keeps no activation for the backward pass.
    Signature: megatron.core.transformer.moe.experts.GroupedMLP.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Any, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """See the class."""
        x, probs = permuted_local_hidden_states, permuted_probs.unsqueeze(-1)
        counts = tuple(tokens_per_expert.tolist())
        if self.config.moe_apply_probs_on_input:
            assert self.config.moe_router_topk == 1, "moe_apply_probs_on_input works with moe_router_topk=1 only"
            x, probs = (probs * x).to(x.dtype), torch.ones_like(probs)
        hidden = self._product(x, self.weight1, counts)
        if not self.activation_recompute:
            return self._product(self._activate(hidden, probs), self.weight2, counts), None
        kept = tensor_parallel.CheckpointWithoutOutput()
        y = self._product(kept.checkpoint(self._activate, hidden, probs), self.weight2, counts)
        kept.discard_output_and_register_recompute(y)
        return y, None

    def _activate(self, hidden: Tensor, probs: Tensor) -> Tensor:
        """By the same kernel as SequentialMLP's where that has one."""
        config = self.config
        if config.bias_activation_fusion and config.gated_linear_unit and config.activation_func == F.silu:
            fused: Tensor = weighted_bias_swiglu_impl(hidden, None, probs, config.activation_func_fp8_input_store)
            return fused
        plain: Tensor = self.activation_func_with_probs(hidden, probs)
        return plain

    def _product(self, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        fused = self.config.gradient_accumulation_fusion and weight.requires_grad
        y: Tensor = _Product.apply(x, weight, counts, fused)  # type: ignore[no-untyped-call]
        return y


def _matrices(weight: Tensor, experts: int, rows: int) -> Tensor:
    """[E, rows, .]: what lies in a parameter's memory."""
    return weight.view(experts, rows, -1)


def _alike(counts: Sequence[int]) -> bool:
    return len(set(counts)) == 1


def _batched(rows: Tensor, counts: Sequence[int]) -> Tensor:
    return rows.reshape(len(counts), counts[0], rows.shape[-1])


class _Product(torch.autograd.Function):
    """Each expert's rows of x [N, I] times its matrix [I, O] in weight; `fused` adds the gradient to main_grad."""

    @staticmethod
    @custom_fwd  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], fused: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.counts, ctx.fused = weight, counts, fused
        matrices = _matrices(weight, len(counts), x.shape[1])
        if _alike(counts):
            return torch.bmm(_batched(x, counts), matrices).flatten(0, 1)
        return torch.cat([rows @ one for rows, one in zip(x.split(counts), matrices, strict=True)])

    @staticmethod
    @custom_bwd  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        [x], weight, counts = ctx.saved_tensors, ctx.weight, ctx.counts
        matrices = _matrices(weight, len(counts), x.shape[1])
        if _alike(counts):
            x, dy = _batched(x, counts), _batched(dy, counts)
            dx = torch.bmm(dy, matrices.transpose(1, 2)).flatten(0, 1)
        else:
            dx = torch.cat([rows @ one.t() for rows, one in zip(dy.split(counts), matrices, strict=True)])
        if not weight.requires_grad:
            return dx, None, None, None
        d_weight = _add_to_main(x, dy, weight, counts) if ctx.fused else _gradients(x, dy, counts).view(weight.shape)
        return dx, d_weight, None, None


def _gradients(x: Tensor, dy: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[E, I, O]: x^T dy of each expert's rows."""
    if _alike(counts):
        return torch.bmm(x.transpose(1, 2), dy)
    return torch.stack([rows.t() @ one for rows, one in zip(x.split(counts), dy.split(counts), strict=True)])


def _add_to_main(x: Tensor, dy: Tensor, weight: Any, counts: tuple[int, ...]) -> Tensor | None:
    """main_grad += x^T dy, without a tensor for the result where both are of one type, as wgrad_gemm_accum_fp32."""
    main = _matrices(weight.main_grad, len(counts), x.shape[-1])
    if dy.dtype != main.dtype:
        main.add_(_gradients(x, dy, counts))
    elif _alike(counts):
        main.baddbmm_(x.transpose(1, 2), dy)
    else:
        for one, rows, gradient in zip(main, x.split(counts), dy.split(counts), strict=True):
            one.addmm_(rows.t(), gradient)
    return stand_in_gradient(weight)
