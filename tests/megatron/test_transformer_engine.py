"""Layers under TransformerEngine's names: upstream's TransformerEngine spec makes the same model as its local spec."""

from __future__ import annotations

from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pytest_plugin import Gloo

pytestmark = pytest.mark.ranks

KINDS: dict[str, dict[str, Any]] = {  # fields of a TransformerConfig
    "dense": {},
    "rms": {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False},
    "zero centred": {"layernorm_zero_centered_gamma": True},
    "qk norm rms": {"qk_layernorm": True, "normalization": "RMSNorm"},
    "grouped": {"num_query_groups": 2},
    "loss": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
    "experts": {
        "num_moe_experts": 2,
        "add_bias_linear": False,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_token_dispatcher_type": "alltoall",
    },
}
LATENT = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "rope_type": "rope"}
LOCAL_NAMES = {  # as sharded_state_dict_keys_map of the local spec says
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
LAYOUTS = [(1, False), (2, False), (2, True)]  # tensor-parallel size, sequence parallelism


def model_of(te: bool, fields: dict[str, Any], tp: int, sequence: bool) -> Any:
    """A GPT of two layers from upstream's spec function; the local one with our norm and attention."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from nxdt_nemo.megatron.models.backends import adapt

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1)
    base = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    base |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    latent = "kv_lora_rank" in fields
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **base, **fields, tensor_model_parallel_size=tp, sequence_parallel=sequence, params_dtype=torch.float32
    )
    named = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm and te,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": latent,
    }
    if te:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**named)
    else:
        spec = adapt(gpt_layer_specs.get_gpt_layer_local_spec(**named, normalization=config.normalization))
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=8, position_embedding_type="rope")


def stepped(model: Any, weights: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the model's weights by their local names, result and gradients by these names); starts from `weights`."""
    import torch

    named = {_local(name, model): parameter for name, parameter in model.named_parameters()}
    if weights is None:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in named.values():
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    else:
        assert weights.keys() == named.keys()
        for name, parameter in named.items():
            parameter.data.copy_(weights[name])
    torch.manual_seed(6)
    tokens = torch.randint(64, (2, 8))
    places = torch.arange(8).expand(2, 8)
    losses = model(tokens, places, None, labels=tokens.roll(1, 1))
    losses.sum().backward()
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    return {name: parameter.detach().clone() for name, parameter in named.items()}, {"losses": losses.detach(), **found}


def _local(name: str, model: Any) -> str:
    if model.config.num_moe_experts:
        return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    for te, local in LOCAL_NAMES.items():
        name = name.replace(te, local)
    return name


def compared(fields: dict[str, Any], tp: int, sequence: bool, fault: str) -> dict[str, Any]:
    """Errors / largest element of each result, and the keys of both checkpoints."""
    local = model_of(False, fields, tp, sequence)
    weights, expected = stepped(local, None)
    te = model_of(True, fields, tp, sequence)
    if fault:
        weights[fault] = weights[fault] * 1.01
    _, found = stepped(te, weights)
    assert found.keys() == expected.keys()
    answer: dict[str, Any] = {
        name: float((found[name] - value).abs().max()) / (float(value.abs().max()) or 1.0)
        for name, value in expected.items()
    }
    answer["keys"] = _keys(local) == _keys(te)
    answer["marks"] = all(
        getattr(parameter, "sequence_parallel", False) == sequence
        for name, parameter in te.named_parameters()
        if "layer_norm_" in name
    )
    _leave()
    return answer


def _keys(model: Any) -> list[str]:
    return sorted(entry.key for entry in model.sharded_state_dict().values())


def _leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("tp, sequence", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_specs_are_one_model(gloo: Gloo, kind, tp, sequence):
    if kind == "experts" and tp > 1 and not sequence:
        pytest.skip("upstream refuses to train experts with tensor parallelism and without sequence parallelism")
    for found in gloo(tp, compared, KINDS[kind], tp, sequence, "", init=ACTIVE, env=ACTIVE_ENV):
        assert found.pop("keys") == (kind != "experts")  # upstream's two specs name an expert layer's norm differently
        assert found.pop("marks")
        assert len(found) > 10
        assert max(found.values()) <= 1e-6, found


def test_a_norm_that_is_off_shows(gloo: Gloo):
    fault = "decoder.layers.1.pre_mlp_layernorm.weight"
    (found,) = gloo(1, compared, {}, 1, False, fault, init=ACTIVE, env=ACTIVE_ENV)
    assert found["losses"] > 1e-4
    assert found["decoder.layers.0.mlp.linear_fc1.weight"] > 1e-4


def latent_attention() -> tuple[bool, list[str]]:
    """Is the loss finite, and which parameters get no gradient?"""
    model = model_of(True, LATENT | {"q_lora_rank": 8, "qk_layernorm": True, "normalization": "RMSNorm"}, 1, False)
    _, found = stepped(model, None)
    _leave()
    names = [name for name, _ in model.named_parameters()]
    return bool(found["losses"].isfinite().all()), [name for name in names if not found[_local(name, model)].any()]


def test_latent_attention_trains(active):
    finite, idle = active(latent_attention)
    assert finite
    assert idle == []


def refused() -> list[str]:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.transformer.moe.experts import SequentialMLP

    model = model_of(True, KINDS["experts"], 1, False)
    assert any(isinstance(module, SequentialMLP) for module in model.modules())
    answers = []
    for gather, expert in ((True, False), (False, True)):
        try:
            TELayerNormColumnParallelLinear(
                8, 8, config=model.config, init_method=None, gather_output=gather, bias=True, skip_bias_add=False,
                is_expert=expert,
            )  # fmt: skip
        except ValueError as error:
            answers.append(str(error))
    _leave()
    return answers


def test_what_the_fused_layer_refuses(active):
    assert active(refused) == ["a layer of norm and linear gathers no output and serves no expert"] * 2


def with_what_the_norm_gave() -> tuple[bool, bool, bool]:
    """(the layer's output is the same as ever, what comes with it is the norm's, of which it is the product)."""
    import torch

    layer = model_of(True, KINDS["rms"], 1, False).decoder.layers[0].mlp.linear_fc1
    x = torch.randn(3, 2, 32)
    plain, _ = layer(x)
    layer.return_layernorm_output = True
    (output, normed), _ = layer(x)
    _leave()
    return torch.equal(output, plain), torch.equal(normed, layer.norm(x)), torch.equal(normed @ layer.weight.T, plain)


def test_adapters_get_what_the_norm_gave(active):
    assert active(with_what_the_norm_gave) == (True, True, True)


def precision_aware(dtypes: dict[str, str]) -> bool | str:
    """What becomes of use_precision_aware_optimizer, or the refusal."""
    import torch
    from megatron.core.optimizer import OptimizerConfig

    from nxdt_nemo.errors import ConfigError

    narrow = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}
    try:
        config = OptimizerConfig(use_precision_aware_optimizer=True, use_distributed_optimizer=True, **narrow)
    except ConfigError as error:
        return str(error)
    return config.use_precision_aware_optimizer


def test_an_optimizer_of_other_precision_is_the_usual_one_where_its_states_are_float32(gloo: Gloo):
    assert gloo(1, precision_aware, {}, init=ACTIVE, env=ACTIVE_ENV) == [False]
    (said,) = gloo(1, precision_aware, {"exp_avg_dtype": "bfloat16"}, init=ACTIVE, env=ACTIVE_ENV)
    assert said.startswith("OptimizerConfig.exp_avg_dtype: torch.bfloat16, where the optimizer's states are float32")


def with_deferral(deferred: bool) -> dict[str, Any]:
    """Gradients of a model whose output layer may put its weight's gradient off."""
    import torch

    model = model_of(True, {}, 1, False)
    model.config.defer_embedding_wgrad_compute = deferred
    model.output_layer.embedding_activation_buffer = []
    torch.manual_seed(6)
    tokens = torch.randint(64, (2, 8))
    model(tokens, torch.arange(8).expand(2, 8), None, labels=tokens.roll(1, 1)).sum().backward()
    _leave()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_layers_put_no_gradient_off(gloo: Gloo):
    (expected,) = gloo(1, with_deferral, False, init=ACTIVE, env=ACTIVE_ENV)
    (found,) = gloo(1, with_deferral, True, init=ACTIVE, env=ACTIVE_ENV)
    assert len(expected) > 10 and found.keys() == expected.keys()
    assert all(found[name].equal(gradient) for name, gradient in expected.items())
