"""Which modules a transformer is built from on this backend.

Room megatron/. Beside megatron.core.models.backends: upstream's local specs (MLA, MoE, BERT and T5 among
them) are taken as they are, with the classes in REPLACED exchanged. A seam, no patch.
Proof: tests/megatron/test_specs.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention as _SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention as _DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from nxdt_nemo.megatron.fusions.fused_layer_norm import Norm
from nxdt_nemo.megatron.transformer.attention import SelfAttention
from nxdt_nemo.megatron.transformer.dot_product_attention import DotProductAttention

__all__ = ["REPLACED", "NeuronSpecProvider", "adapt"]


class NeuronSpecProvider(LocalSpecProvider):
    """megatron.core.models.backends.BackendSpecProvider for this backend."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """One norm for both kinds."""
        return Norm

    def core_attention(self) -> type:
        """Attention in plain torch."""
        return DotProductAttention


_provider = NeuronSpecProvider()
REPLACED: dict[type, type] = {
    FusedLayerNorm: _provider.layer_norm(),
    WrappedTorchNorm: _provider.layer_norm(rms_norm=True),
    _DotProductAttention: _provider.core_attention(),
    _SelfAttention: SelfAttention,
}


def adapt(spec: Any) -> Any:
    """A copy of an upstream spec with every class in REPLACED exchanged, at any depth."""
    if isinstance(spec, type):
        return REPLACED.get(spec, spec)
    if isinstance(spec, ModuleSpec) or (dataclasses.is_dataclass(spec) and not isinstance(spec, type)):
        changes = {field.name: adapt(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **changes)
    if isinstance(spec, list):
        return [adapt(item) for item in spec]
    return spec
