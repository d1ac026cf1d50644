"""Which classes a model is built from, for every spec name of NeMo and every kind of layer, at every depth."""

from __future__ import annotations

import ast
import dataclasses
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ranks

KINDS: dict[str, dict[str, Any]] = {  # fields of a TransformerConfig
    "dense": {},
    "dense rms": {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False},
    "qk norm": {"qk_layernorm": True},
    "qk norm rms": {"qk_layernorm": True, "normalization": "RMSNorm"},
    "grouped": {"num_query_groups": 2},
    "experts": {"num_moe_experts": 2, "add_bias_linear": False},
    "experts, together": {"num_moe_experts": 2, "moe_grouped_gemm": True, "add_bias_linear": False},
    "experts, shared": {"num_moe_experts": 2, "moe_shared_expert_intermediate_size": 32, "add_bias_linear": False},
    "latent": {"multi_latent_attention": True, "qk_layernorm": True, "normalization": "RMSNorm", "q_lora_rank": 8},
    "latent experts": {"multi_latent_attention": True, "num_moe_experts": 2, "add_bias_linear": False},
}
# Spec names of NeMo that this backend has no layers for yet; the error names model.name.
REFUSED = {"megatron_falcon_gpt", "megatron_gemma2", "modelopt", "te_gpt_hyena"}


def transformer_config(fields: dict[str, Any]) -> Any:
    import torch
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    latent = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "rope_type": "rope"}
    base = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "use_cpu_initialization": True}
    kind = MLATransformerConfig if "multi_latent_attention" in fields else TransformerConfig
    extra = latent if kind is MLATransformerConfig else {}
    return kind(**base, **extra, **fields, params_dtype=torch.float32)


def classes(spec: Any) -> list[type]:
    """Every class in a spec, wherever it stands."""
    if isinstance(spec, type):
        return [spec]
    if isinstance(spec, list | tuple):
        return [found for item in spec for found in classes(item)]
    if isinstance(spec, dict):
        return [found for item in spec.values() for found in classes(item)]
    if dataclasses.is_dataclass(spec):
        return [found for field in dataclasses.fields(spec) for found in classes(getattr(spec, field.name))]
    return []


def names(spec: Any) -> list[str]:
    return sorted({f"{kind.__module__}.{kind.__qualname__}" for kind in classes(spec)})


def one_group() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)


def named_classes(spec_name: str, use_te: bool, fields: dict[str, Any]) -> list[str]:
    """What NeMo gets for `model.name`, or the text of the error."""
    from nxdt_nemo.errors import ConfigError
    from nxdt_nemo.nemo.collections.nlp.models.language_modeling.megatron_gpt_model import get_specs

    one_group()
    try:
        return names(get_specs(spec_name, transformer_config(fields), use_te))
    except ConfigError as error:
        return ["refused", error.place, str(error)]


def spec_names() -> set[str]:
    """The names in upstream's get_specs, read from its source."""
    spec = PathFinder.find_spec("nemo")  # not sys.modules: pytest calls tests/nemo `nemo`
    assert spec is not None
    assert spec.submodule_search_locations
    file = "collections/nlp/models/language_modeling/megatron_gpt_model.py"
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    function = next(node for node in ast.walk(tree) if getattr(node, "name", "") == "get_specs")
    table = max((node for node in ast.walk(function) if isinstance(node, ast.Dict)), key=lambda node: len(node.keys))
    return {key.value for key in table.keys if isinstance(key, ast.Constant)}


def assert_ours(found: list[str]) -> None:
    assert "nxdt_nemo.megatron.fusions.fused_layer_norm.Norm" in found
    theirs = [name for name in found if not name.startswith("nxdt_nemo.")]
    wrong = [name for name in theirs if "norm" in name.lower() or "DotProductAttention" in name or ".TE" in name]
    assert wrong == []
    assert not any("transformer_engine" in name for name in found)


@pytest.mark.parametrize("use_te", [True, False])
def test_every_name_of_nemo(active, use_te):
    known = spec_names()
    assert {"", "te_gpt"} < known
    refused = set()
    for name in sorted(known):
        found = active(named_classes, name, use_te, {})
        if found[0] == "refused":
            assert found[1] == "model.name"
            assert repr(name) in found[2]
            refused.add(name)
        else:
            assert_ours(found)
            assert "nxdt_nemo.megatron.transformer.dot_product_attention.DotProductAttention" in found
    assert refused == known & REFUSED


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(active, kind):
    for name in ("", "decoder_block_gpt"):
        found = active(named_classes, name, False, KINDS[kind])
        assert_ours(found)
        assert "nxdt_nemo.megatron.transformer.dot_product_attention.DotProductAttention" in found


def keys(fields: dict[str, Any]) -> list[list[str]]:
    """Keys of sharded_state_dict and state_dict: our layers', then those of upstream's local spec."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec
    from nxdt_nemo.megatron.transformer.dot_product_attention import DotProductAttention

    one_group()
    config = transformer_config(fields)
    stock = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    stock = dataclasses.replace(stock, layer_norm=WrappedTorchNorm)  # theirs refuses RMSNorm as the final norm
    answers = []
    for spec in (get_gpt_block_spec(config), stock):
        model = GPTModel(config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope")
        answers.append(sorted(model.sharded_state_dict()))
        answers.append(sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()
                              if isinstance(tensor, torch.Tensor)))  # fmt: skip
        ours = [m for m in model.modules() if isinstance(m, DotProductAttention)]
        assert len(ours) == (2 if spec is not stock else 0)
        assert not any(m.scale_mask_softmax.scaled_masked_softmax_fusion for m in ours)
    return answers


# Latent attention cannot be built from upstream's local spec: its attention takes no k_channels in 0.13.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("latent")])
def test_checkpoints_have_upstreams_keys(active, kind):
    sharded, state, stock_sharded, stock_state = active(keys, KINDS[kind])
    assert sharded == stock_sharded
    assert state == stock_state
    assert len(sharded) > 5


def adapted_leaves_upstream_alone() -> list[bool]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from nxdt_nemo.megatron.models.backends import REPLACED, NeuronSpecProvider, adapt

    stock = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    before = names(stock)
    ours = adapt(stock)
    provider = NeuronSpecProvider()
    return [
        names(stock) == before,
        any(kind in REPLACED for kind in classes(stock)),
        not any(kind in REPLACED for kind in classes(ours)),
        len(classes(ours)) == len(classes(stock)),
        names(adapt(ours)) == names(ours),
        {provider.layer_norm(), provider.layer_norm(True), provider.layer_norm(True, True)} <= set(REPLACED.values()),
        provider.core_attention() in REPLACED.values(),
    ]


def test_adapt_copies(active):
    assert active(adapted_leaves_upstream_alone) == [True] * 7
