"""Attention with linear biases: slopes as the paper's, and on tensor-parallel ranks what one rank computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout, Recipe

S, B, N, D = 12, 2, 8, 4


@pytest.mark.parametrize("heads", [1, 2, 8, 16, 6, 12, 40])
def test_slopes_are_blooms(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    from nxdt_nemo.megatron.transformer.alibi import slopes_of

    theirs = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    assert torch.allclose(slopes_of(heads, torch.device("cpu")), theirs[:, 0, 1], rtol=1e-6, atol=0)


def inputs(groups: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the gradient of the result, of all heads."""
    made = torch.Generator().manual_seed(3)
    shapes = (S, B, N, D), (S, B, groups, D), (S, B, groups, D), (S, B, N * D)
    return tuple(torch.randn(shape, generator=made) for shape in shapes)


def expected(groups: int) -> list[torch.Tensor]:
    """The result and the three gradients, written out."""
    *leaves, grad = inputs(groups)
    query, key, value = (x.double().requires_grad_() for x in leaves)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key.repeat_interleave(N // groups, 2)) / math.sqrt(D)
    distance = torch.arange(S)[:, None] - torch.arange(S)
    slopes = torch.tensor([2.0 ** -(head + 1) for head in range(N)], dtype=torch.float64)
    scores = (scores - slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
    result = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value.repeat_interleave(N // groups, 2)).flatten(2)
    return [x.detach() for x in (result, *torch.autograd.grad(result, (query, key, value), grad.double()))]


def layer(groups: int, **fields: Any) -> Any:
    """Core attention, with ALiBi."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nxdt_nemo.megatron.transformer.dot_product_attention import DotProductAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=N * D,
        num_attention_heads=N,
        num_query_groups=groups,
        **{"attention_dropout": 0.0, **fields},
    )
    config.position_embedding_type = "alibi"
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


def on_a_rank(tp: int, groups: int, positions: str) -> list[torch.Tensor]:
    """This rank's heads of the result and of the gradients."""
    from megatron.core import parallel_state

    _model_parallel(Recipe.of("gpt"), Layout(tp=tp))
    try:
        rank = parallel_state.get_tensor_model_parallel_rank()
        *leaves, grad = inputs(groups)
        query, key, value = (x.chunk(tp, 2)[rank].clone().requires_grad_() for x in leaves)
        attention = layer(groups, tensor_model_parallel_size=tp)
        attention.config.position_embedding_type = positions
        result = attention(query, key, value, None)
        found = (result, *torch.autograd.grad(result, (query, key, value), grad.chunk(tp, 2)[rank]))
        return [x.detach() for x in found]
    finally:
        forget_groups()


def worst(found: list[list[torch.Tensor]], groups: int) -> float:
    """Errors / largest element, of all ranks' heads together."""
    pairs = zip((torch.cat(parts, 2) for parts in zip(*found, strict=True)), expected(groups), strict=True)
    return max(float((mine - right).abs().max() / right.abs().max()) for mine, right in pairs)


@pytest.mark.ranks
@pytest.mark.parametrize(("tp", "groups"), [(1, N), (2, 2), (2, N)])
def test_equals_what_is_written_out(gloo: Gloo, tp: int, groups: int) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    assert worst(gloo(tp, on_a_rank, tp, groups, "alibi", init=ACTIVE, env=ACTIVE_ENV), groups) < 1e-6
    assert worst(gloo(tp, on_a_rank, tp, groups, "none", init=ACTIVE, env=ACTIVE_ENV), groups) > 1e-2


def dropped(tp: int) -> tuple[list[torch.Tensor], bool]:
    """Two calls with dropout, of values that are all 1; and whether the generator that all ranks share stood still."""
    _model_parallel(Recipe.of("gpt"), Layout(tp=tp))
    try:
        query, key, value = (x.chunk(tp, 2)[0] for x in inputs(N)[:3])
        attention = layer(N, tensor_model_parallel_size=tp, attention_dropout=0.3)
        before = torch.get_rng_state()
        found = [attention(query, key, torch.ones_like(value), None) for _ in range(2)]
        whole = attention.eval()(query, key, torch.ones_like(value), None)
        return [*found, whole], torch.equal(before, torch.get_rng_state())
    finally:
        forget_groups()


@pytest.mark.ranks
def test_dropout_draws_from_the_ranks_own_stream(gloo: Gloo) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    (first, untouched), (second, _) = gloo(2, dropped, 2, init=ACTIVE, env=ACTIVE_ENV)
    assert untouched
    one, again, whole = first
    assert not torch.equal(one, again) and not torch.equal(one, second[0])
    assert torch.allclose(whole, torch.ones_like(whole)) and abs(float(one.mean()) - 1) < 0.1
