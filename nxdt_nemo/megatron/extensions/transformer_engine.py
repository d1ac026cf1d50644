"""What megatron-core takes from TransformerEngine, in plain torch.

Room megatron/. Stands in for names of megatron.core.extensions.transformer_engine. The layers: without them a script
that leaves `--transformer-impl` at its default, or names these classes in a spec of its own, gets mocks or an
ImportError. They are megatron-core's own layers (and our norm and attention) under TransformerEngine's names,
arguments and parameter names, so that checkpoints go either way. The rotary embeddings: without them a
TransformerConfig with apply_rope_fusion, NeMo's default for Llama and others, cannot even be made. The setting stays
as the user wrote it, and the results are those of megatron-core without fusion, to the bit.
May import torch, megatron.core and nxdt_nemo.apex. Proof: tests/megatron/test_rope.py,
tests/megatron/test_transformer_engine.py.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn

from nxdt_nemo.apex.transformer.functional import fused_rope
from nxdt_nemo.errors import NotOnNeuron
from nxdt_nemo.megatron.fusions.fused_layer_norm import Norm, normalized
from nxdt_nemo.megatron.transformer.dot_product_attention import DotProductAttention

__all__ = [
    "TEColumnParallelLinear",
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TENorm",
    "TERowParallelLinear",
    "fused_apply_rotary_pos_emb",
    "fused_apply_rotary_pos_emb_thd",
]


class TENorm(Norm):
    """LayerNorm or RMSNorm, as the configuration says."""


class TEColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's; TransformerEngine's arguments are some of its own. Needs no seeded streams, as TE's does not."""

    def __init__(self, *args: Any, config: Any, init_method: Callable[..., Any], **named: Any) -> None:
        super().__init__(*args, config=_unseeded(config), init_method=init_method, **named)
        _start(self, config, init_method, 0)
        # defer_embedding_wgrad_compute is the output layer's matter; megatron-core's forward keeps inputs in any layer.
        self.embedding_activation_buffer: deque[Tensor] = deque(maxlen=0)


class TERowParallelLinear(RowParallelLinear):
    """megatron-core's; TransformerEngine's arguments are some of its own. Needs no seeded streams, as TE's does not."""

    def __init__(self, *args: Any, config: Any, init_method: Callable[..., Any], **named: Any) -> None:
        super().__init__(*args, config=_unseeded(config), init_method=init_method, **named)
        _start(self, config, init_method, 1)


def _unseeded(config: Any) -> Any:
    """`config`; one that initializes nothing while the tracker has no streams to draw weights from."""
    if get_cuda_rng_tracker().is_initialized():
        return config
    bare = copy.copy(config)
    bare.perform_initialization = False
    return bare


def _start(layer: Any, config: Any, init_method: Callable[..., Any], dim: int) -> None:
    """Draw the weights of a layer that was made without, from torch's own stream."""
    bare, layer.config = layer.config, config
    if bare is not config and config.perform_initialization and layer.weight is not None:
        set_tensor_model_parallel_attributes(layer.weight, True, dim, 1)
        init_method(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
    """Y = norm(X) A^T + b; rank r of t keeps rows r*O/t .. (r+1)*O/t of A.

    S sequence, B micro-batch, H in, O out, t tensor-parallel size.
      x                  [S, B, H]      params_dtype; [S/t, B, H] with sequence parallelism
      layer_norm_weight  [H]            params_dtype; as Norm.weight
      layer_norm_bias    [H]            LayerNorm only; as Norm.bias
      weight, bias       [O/t, H], [O/t]
      returns            [S, B, O/t], and the bias if skip_bias_add, else None; with return_layernorm_output,
                         which NeMo's adapters set, ([S, B, O/t], norm(X)) and the bias
    Raises ValueError for gather_output and for experts, as upstream.
    Signature: megatron.core.extensions.transformer_engine.TELayerNormColumnParallelLinear.
    """

    return_layernorm_output = False

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[..., Any],
        gather_output: bool,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
    ) -> None:
        if gather_output or is_expert:
            raise ValueError("a layer of norm and linear gathers no output and serves no expert")
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            bias=bias,
            skip_bias_add=skip_bias_add,
            skip_weight_param_allocation=skip_weight_param_allocation,
            tp_group=tp_group,
        )
        norm = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight: nn.Parameter = norm.weight
        self.register_parameter("layer_norm_bias", norm.bias)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        """See the class."""
        normed = self.norm(input_)
        output, bias = super().forward(normed, weight, runtime_gather_output)
        return ((output, normed) if self.return_layernorm_output else output), bias

    def norm(self, x: Tensor) -> Tensor:
        """norm(x), [S, B, H]."""
        return normalized(x, self.layer_norm_weight, self.layer_norm_bias, self.config, self.config.layernorm_epsilon)


class TEDotProductAttention(DotProductAttention):
    """Ours. Needs no seeded streams, as TE's does not: without, dropout draws from torch's own."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = "p2p",
        model_comm_pgs: Any = None,
    ) -> None:
        super().__init__(
            config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type,
            model_comm_pgs, k_channels=k_channels, v_channels=v_channels,
        )  # fmt: skip

    def _upstream(self, *arguments: Any) -> Tensor:
        if get_cuda_rng_tracker().is_initialized():
            return super()._upstream(*arguments)
        config, self.config = self.config, copy.copy(self.config)
        self.config.sequence_parallel = True  # so that upstream does not ask for a stream
        try:
            return super()._upstream(*arguments)
        finally:
            self.config = config


def fused_apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False
) -> Tensor:
    """Rotate t [s, b, h, d] by the angles freqs [s, 1, 1, d2], d2 <= d.

    interleaved              features 2i and 2i + 1 turn together, not i and i + d2 / 2
    transpose_output_memory  has no effect, as upstream: the result is laid out as t is
    """
    if interleaved:
        return _rotate_pairs(t, freqs.cos(), freqs.sin())
    return fused_rope.fused_apply_rotary_pos_emb(t, freqs)


def fused_apply_rotary_pos_emb_thd(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """Rotate packed sequences t [total, h, d]; each starts at angle 0.

    cu_seqlens [sequences + 1] holds where they begin and end; freqs [max_s, 1, 1, d2].
    Raises NotOnNeuron with cp_size > 1.
    """
    if cp_size > 1:
        raise NotOnNeuron("rotary embeddings of packed sequences with context parallelism are not available on Neuron")
    return fused_rope.fused_apply_rotary_pos_emb_thd(t, cu_seqlens, freqs)


def _rotate_pairs(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, kept = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
    quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turned * cos.to(t.dtype) + quarter * sin.to(t.dtype), kept), dim=-1)
