"""Activation checkpointing: gradients and random streams of a tiny GPT with dropout, to the bit those without it.

Each case also says which modules run again in the backward pass, since a setting that does nothing changes no gradient.
Where an RMSNorm alone is recomputed, gradients agree to rounding: its backward pass is several nodes, whose parts are
added to the residual's gradient one by one, and to each other first where a checkpoint hands them out as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.pool import RankError
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Family, Layout, Recipe, micro_batches, transformer_fields

pytestmark = pytest.mark.ranks

LAYERS = 4
ONE, TWO = Layout(), Layout(tp=2)
FULL = {"recompute_granularity": "full"}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall", "add_bias_linear": False}
GROUPED = {**MOE, "moe_grouped_gemm": True}
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 16,
    "rotary_scaling_factor": 2.0,
    "add_bias_linear": False,
}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


@dataclass(frozen=True)
class Case:
    """One setting.

    recompute   what is compared with its absence
    again       how often these modules (by the end of their names) run in a step, one micro-batch, all layers
    fields      of the TransformerConfig on both sides
    error       how far a gradient may be from that without, of its largest element; 0.0 is to the bit
    bound       the config's moe_dropless_bound
    """

    recompute: dict[str, Any]
    again: dict[str, int]
    fields: dict[str, Any] = field(default_factory=dict)
    family: Family = "gpt"
    layout: Layout = ONE
    error: float = 0.0
    bound: str | None = None


def full(method: str, layers: int, again: int, **more: Any) -> Case:
    return Case({**FULL, "recompute_method": method, "recompute_num_layers": layers}, {"mlp": again}, **more)


TWICE = 2 * LAYERS
CASES = {
    "full, uniform": full("uniform", 1, TWICE),
    "full, uniform by two": full("uniform", 2, TWICE, family="llama"),
    "full, block": full("block", 2, LAYERS + 2),
    "attention": Case(selective("core_attn"), {"core_attention": TWICE, "mlp": LAYERS}),
    "attention, no dropout": Case(selective("core_attn"), {"core_attention": TWICE}, {"attention_dropout": 0.0}),
    "mlp": Case(selective("mlp"), {"mlp": TWICE, "core_attention": LAYERS}),
    "mlp without biases": Case(selective("mlp"), {"mlp": TWICE, "core_attention": LAYERS}, family="llama"),
    "norms": Case(selective("layernorm"), {"input_layernorm": TWICE, "pre_mlp_layernorm": TWICE, "mlp": LAYERS}),
    "RMS norms": Case(
        selective("layernorm"), {"input_layernorm": TWICE, "pre_mlp_layernorm": TWICE}, family="llama", error=1e-6
    ),
    "all of a dense layer": Case(
        selective("core_attn", "mlp", "layernorm"),
        {"core_attention": TWICE, "mlp": TWICE, "input_layernorm": TWICE, "pre_mlp_layernorm": TWICE},
    ),
    "experts": Case(selective("moe"), {"router": TWICE, "experts": TWICE, "core_attention": LAYERS}, MOE),
    "experts' activations": Case(selective("moe_act"), {"moe_act": TWICE, "experts": LAYERS}, GROUPED),
    "experts' activations, fixed shapes": Case(
        selective("moe_act"), {"moe_act": TWICE, "experts": LAYERS}, GROUPED, bound="worst"
    ),
    "latent attention": Case(selective("mla_up_proj"), {"linear_kv_up_proj": TWICE, "linear_proj": LAYERS}, MLA),
}
CASES_OF_TWO = {
    "full": full("uniform", 1, TWICE, layout=TWO),
    "full, saved in parts": full("uniform", 1, TWICE, layout=TWO),
    "full, block, saved in parts": full("block", 2, LAYERS + 2, family="llama", layout=TWO),
    "full, sequence parallel": full("block", 2, LAYERS + 2, layout=Layout(tp=2, sp=True)),
    "selective, sequence parallel": Case(
        selective("core_attn", "layernorm"),
        {"core_attention": TWICE, "input_layernorm": TWICE},
        family="llama",
        layout=Layout(tp=2, sp=True),
        error=1e-6,
    ),
}
for name, case in CASES_OF_TWO.items():
    if "parts" in name:
        case.recompute["distribute_saved_activations"] = True


def recipe_of(case: Case) -> Recipe:
    return Recipe.of(case.family, layers=LAYERS, micro_batches=1, vocab=256, seq=16)


def model_of(case: Case, recompute: dict[str, Any]) -> Any:
    """Weights are the same whatever is recomputed."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec

    recipe, llama = recipe_of(case), case.family == "llama"
    fields = transformer_fields(recipe) | {"hidden_dropout": 0.1, "attention_dropout": 0.1} | case.fields
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    if not fields["add_bias_linear"] and not llama:
        fields["bias_activation_fusion"] = False
    config = kind(
        **fields | recompute,
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        tensor_model_parallel_size=case.layout.tp,
        sequence_parallel=case.layout.sp,
    )
    config.moe_dropless_bound = case.bound
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    model = GPTModel(
        config,
        get_gpt_block_spec(config),
        vocab_size=recipe.vocab,
        max_sequence_length=recipe.seq,
        position_embedding_type="rope" if llama or kind is MLATransformerConfig else "learned_absolute",
    )
    return model.train()


def step(case: Case, recompute: dict[str, Any]) -> tuple[dict[str, Any], Counter[str], Any]:
    """Gradients by name, how often each kind of module ran, and where the random streams stand at the end."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    from nxdt_nemo.megatron.transformer.moe.experts import GroupedMLP

    model, ran = model_of(case, recompute), Counter[str]()

    def counted(name: str) -> Callable[..., None]:
        return lambda *_: ran.update([name])

    for path, module in model.named_modules():
        module.register_forward_pre_hook(counted(path.rpartition(".")[2]))
        if isinstance(module, GroupedMLP):  # its activation is no module
            module._activate = lambda *args, act=module._activate: (ran.update(["moe_act"]), act(*args))[1]
    [batch] = micro_batches(recipe_of(case), 0)
    tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
    model_parallel_cuda_manual_seed(11)
    torch.manual_seed(11)
    model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None, labels=labels).mean().backward()
    streams = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.any() for grad in grads.values())
    return grads, ran, streams


def compared(case: Case, broken: bool = False) -> tuple[float, dict[str, int], bool]:
    """The largest error of a gradient, counts of case.again, and whether the random streams agree.

    broken  the random states are not put back for the second run
    """
    import torch
    from megatron.core.tensor_parallel import random

    state = _model_parallel(recipe_of(case), case.layout)
    put_back = random._set_all_rng_states
    try:
        plain, _, plain_streams = step(case, {})
        if broken:
            random._set_all_rng_states = lambda *_: None
        found, ran, streams = step(case, case.recompute)
    finally:
        random._set_all_rng_states = put_back
        state.destroy_model_parallel()
        forget_groups()
    errors = [float((found[name] - grad).abs().max() / grad.abs().max()) for name, grad in plain.items()]
    same = all(torch.equal(one, other) for one, other in zip(plain_streams, streams, strict=True))
    return max(errors), {name: ran[name] for name in case.again}, same


Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(gloo: Gloo) -> Run:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    return lambda world, function, *args: gloo(world, function, *args, init=ACTIVE, env=ACTIVE_ENV)


def assert_good(found: list[Any], case: Case) -> None:
    for error, again, same_streams in found:
        assert error <= case.error and again == case.again and same_streams, (error, again, same_streams)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_without(run: Run, name: str) -> None:
    assert_good(run(1, compared, CASES[name]), CASES[name])


@pytest.mark.parametrize("name", CASES_OF_TWO)
def test_gradients_of_two_ranks_are_those_without(run: Run, name: str) -> None:
    assert_good(run(2, compared, CASES_OF_TWO[name]), CASES_OF_TWO[name])


@pytest.mark.parametrize("name", ["full, uniform", "attention", "all of a dense layer"])
def test_random_numbers_that_are_not_drawn_again_would_be_seen(run: Run, name: str) -> None:
    [(error, again, _)] = run(1, compared, CASES[name], True)
    assert error > 1e-3 and again == CASES[name].again


# --- saved in parts -------------------------------------------------------------------------------------------------


def saved(case: Case) -> int:
    """Elements of the layers' inputs that are kept for the backward pass."""
    from megatron.core.tensor_parallel import random

    state = _model_parallel(recipe_of(case), case.layout)
    kept: list[Any] = []
    forward = random.CheckpointFunction.forward

    def noted(ctx: Any, function: Any, distribute: bool, *args: Any) -> Any:
        result = forward(ctx, function, distribute, *args)
        kept.append(args[0].numel())
        return result

    random.CheckpointFunction.forward = staticmethod(noted)
    try:
        step(case, case.recompute)
    finally:
        random.CheckpointFunction.forward = staticmethod(forward)
        state.destroy_model_parallel()
        forget_groups()
    return sum(kept)


def test_parts_are_half_of_the_whole(run: Run) -> None:
    whole, parts = (run(2, saved, CASES_OF_TWO[name]) for name in ("full", "full, saved in parts"))
    recipe = recipe_of(CASES["full, uniform"])
    assert whole == [LAYERS * recipe.seq * recipe.micro_batch * recipe.hidden] * 2
    assert parts == [whole[0] // 2] * 2


# --- a sum at the end ----------------------------------------------------------------------------------------------


def summed_last(normed: bool) -> tuple[float, int, bool]:
    """Of a function that ends with a sum over ranks, or with a norm of it: the gradients' error, the sums of the
    backward pass, and whether the function was found to read it."""
    import torch
    from megatron.core.tensor_parallel import checkpoint
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )

    from nxdt_nemo.megatron.tensor_parallel.random import _Runs
    from nxdt_nemo.runtime.traffic import count_traffic

    state = _model_parallel(recipe_of(CASES["full, uniform"]), TWO)
    torch.manual_seed(torch.distributed.get_rank())
    weight = torch.randn(8, 8, requires_grad=True)

    def layer(x: Any) -> Any:
        y = reduce_from_tensor_model_parallel_region(copy_to_tensor_model_parallel_region(x) @ weight)
        return torch.nn.functional.rms_norm(y, (8,)) if normed else x + y

    def gradients(call: Callable[[Any], Any]) -> tuple[list[Any], int]:
        x = torch.ones(4, 8, requires_grad=True)
        y = call(x)
        weight.grad = None
        with count_traffic() as sent:
            y.pow(2).sum().backward()
        return [x.grad, weight.grad], sum(one.calls for one in sent.values())

    try:
        plain, _ = gradients(layer)
        found, sums = gradients(lambda x: checkpoint(layer, False, x))
    finally:
        state.destroy_model_parallel()
        forget_groups()
    error = max(float((one - other).abs().max()) for one, other in zip(plain, found, strict=True))
    return error, sums, any(layer.__code__ in key for key in _Runs.reading if isinstance(key, tuple))


@pytest.mark.parametrize("normed", [False, True])
def test_a_sum_is_made_again_only_where_it_is_read(run: Run, normed: bool) -> None:
    """The gradient of the input is one sum."""
    assert run(2, summed_last, normed) == [(0.0, 2 if normed else 1, normed)] * 2


# --- names and combinations that are not there ----------------------------------------------------------------------


def configured(fields: dict[str, Any]) -> None:
    from megatron.core.transformer import TransformerConfig

    TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, **fields)


REFUSED = [
    ({"recompute_granularity": "some"}, 'must be "full"'),
    ({**FULL, "recompute_method": "every other", "recompute_num_layers": 1}, 'must be "block" or "uniform"'),
    (FULL, 'recompute_method must be "block" or "uniform"'),
    ({**FULL, "recompute_method": "block"}, "recompute_num_layers must be between"),
    (selective("core_attention"), "Invalid choices for recompute_modules: {'core_attention'}"),
    (selective("moe_act"), "moe_act in recompute_modules is only supported with moe_grouped_gemm"),
    (selective("mla_up_proj"), "only supported with multi_latent_attention"),
    ({**selective("mlp"), "recompute_num_layers": 1}, "recompute_num_layers must be None"),
    (
        {
            **FULL,
            "recompute_method": "block",
            "recompute_num_layers": 1,
            "distribute_saved_activations": True,
            "sequence_parallel": True,
            "tensor_model_parallel_size": 2,
        },
        "must be false when sequence parallel is enabled",
    ),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED)
def test_an_unknown_name_is_an_error(run: Run, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RankError) as error:
        run(1, configured, fields)
    assert text in str(error.value)
