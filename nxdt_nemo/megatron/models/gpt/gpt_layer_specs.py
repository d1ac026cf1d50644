"""What a GPT's layers are made of on this backend: one function for every spec name.

Room megatron/. Stands in for megatron.core.models.gpt.gpt_layer_specs, whose TransformerEngine specs need
CUDA. Proof: tests/megatron/test_specs.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from nxdt_nemo.megatron.fusions.fused_layer_norm import Norm
from nxdt_nemo.megatron.models.backends import adapt
from nxdt_nemo.megatron.transformer.moe.token_shuffle import shuffle_group

__all__ = ["get_gpt_block_spec", "get_gpt_layer_spec"]


def get_gpt_layer_spec(config: Any) -> ModuleSpec:
    """One layer for a TransformerConfig: dense or mixture of experts, multi-head, grouped or latent attention."""
    with _grouped_experts():
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
    return adapt(layer)


def get_gpt_block_spec(config: Any, vp_stage: int | None = None, *, mixed: bool = False) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, and the final norm.

    mixed  dense and expert layers follow config.moe_layer_freq ("decoder_block_gpt" in NeMo)
    Given whole, since upstream would add a norm of its own to a single layer's spec. Every rank comes by here before
    it builds a layer, some of them none of experts: groups that all ranks make together are made here.
    """
    if config.num_moe_experts is not None:
        shuffle_group(config)
    if mixed:
        with _grouped_experts():
            block = get_gpt_decoder_block_spec(
                config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
            )
        return adapt(block)
    layer = get_gpt_layer_spec(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=Norm)


@contextmanager
def _grouped_experts() -> Iterator[None]:
    """Without upstream's advice to update TransformerEngine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The legacy GroupedMLP")
        yield
