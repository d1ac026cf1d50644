"""The layers of TransformerEngine's specs.

Room megatron/. Stands in for megatron.core.extensions.transformer_engine_spec_provider.TESpecProvider: its specs name
our stand-ins (transformer_engine.py beside this file). Proof: tests/megatron/test_transformer_engine.py.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from nxdt_nemo.megatron.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)

__all__ = ["TESpecProvider"]


class TESpecProvider(BackendSpecProvider):
    """megatron.core.models.backends.BackendSpecProvider for "transformer_engine"."""

    def column_parallel_linear(self) -> type:
        """As upstream."""
        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """As upstream."""
        return TERowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """As upstream: a norm and the linear layer behind it are one module."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """As upstream."""
        return TELayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """One norm for all uses; upstream's for queries and keys may take no RMSNorm."""
        return TENorm

    def core_attention(self) -> type:
        """As upstream."""
        return TEDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool) -> tuple[type, Any]:
        """One expert after the other: the grouped products are CUDA kernels, the result is the same."""
        return SequentialMLP, MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
