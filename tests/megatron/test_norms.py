"""The norms that exp_manager logs: of the whole model's parameters and gradients, in any layout, once each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.parity import NO_CLIPPING
from nxdt_nemo.testing.recipe import Layout, Recipe, layout, micro_batches

pytestmark = pytest.mark.ranks


def norms_of(recipe: Recipe, weights: dict[str, torch.Tensor], place: Layout, blind_to: str) -> dict[str, float]:
    """One rank's answers after one backward pass; `blind_to` takes a mark of copies away."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    from nxdt_nemo.megatron.optimizer.norms import gradient_norm, parameter_norm, sharded_gradient_norm
    from nxdt_nemo.testing import ours
    from nxdt_nemo.testing.weights import Ranks, load

    try:
        model = ours._stages(recipe, place, ours._model_parallel(recipe, place))
        load(model, weights, recipe.gated, Ranks.here())
        chunks, optimizer = ours._wrap(model, recipe, place.zero)
        model[0].config.finalize_model_grads_func = finalize_model_grads
        params = [param for chunk in model for param in chunk.parameters()]
        for param in params:
            if blind_to == "shared":
                param.shared = False
            elif blind_to == "KV copies" and hasattr(param, "kv_heads"):
                param.tensor_model_parallel = True
            elif blind_to == "experts":
                param.allreduce = True
        found = {"parameters": float(parameter_norm(params))}
        for chunk in chunks:
            chunk.zero_grad_buffer()
        ours.forward_backward(
            chunks, recipe, micro_batches(recipe, 0)[parallel_state.get_data_parallel_rank() :: place.dp]
        )
        if place.zero:
            found["gradients"] = float(sharded_gradient_norm(optimizer))
        else:
            for param in params:
                param.grad = param.main_grad
            found["gradients"] = float(gradient_norm(params))
            for param in params:
                param.grad = None
        found["the optimizer's"] = float(optimizer.step()[1])
        return found
    finally:
        ours.forget_groups()


QUICK = ("gpt pp2", "llama tp2+zero 1", "mixtral ep2dp2+zero")


def cases(*names: str) -> list[Any]:
    found = []
    for name in names:
        family, text, *groups = name.split()
        recipe, place = recipe_of(family, text)
        recipe = replace(recipe, clip=NO_CLIPPING, **({"kv_groups": int(groups[0])} if groups else {}))
        found.append(pytest.param(recipe, place, id=name, marks=[] if name in QUICK else pytest.mark.slow))
    return found


@pytest.mark.parametrize(
    ("recipe", "place"),
    cases(
        *QUICK,
        "gpt pp2vpp2",
        "gpt cp2dp2+zero",
        "llama tp4 2",
        "mixtral ep2dp2",
        "mixtral tp2spep2etp1dp2+zero",
        "gpt tp2spdp2+zero",
    ),
)
def test_each_element_counts_once(parity, gloo, recipe, place):
    """llama tp2, 1 group: both ranks have the KV head. gpt pp2: both stages have the embedding."""
    weights = parity.weights(recipe)
    arguments = (recipe, weights, place, "")
    ranks = gloo(place.world, norms_of, *arguments, init=ACTIVE, env=ACTIVE_ENV)
    [one] = gloo(1, norms_of, recipe, weights, layout("one"), "", init=ACTIVE, env=ACTIVE_ENV)
    whole = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights.values()))
    for found in (one, *ranks):
        assert found == ranks[0] or found is one  # all ranks say the same
        assert found["parameters"] == pytest.approx(whole, rel=1e-6)
        assert found["gradients"] == pytest.approx(found["the optimizer's"], rel=1e-6)
        assert found["gradients"] == pytest.approx(one["gradients"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "groups", "blind_to"), [("pp2", 8, "shared"), ("tp2", 1, "KV copies"), ("ep2dp2", 4, "experts")]
)
def test_a_copy_that_is_not_told_shows(parity, gloo, name, groups, blind_to):
    family = {"shared": "gpt", "KV copies": "llama", "experts": "mixtral"}[blind_to]
    recipe, place = recipe_of(family, name)
    recipe = replace(recipe, kv_groups=groups)
    weights = parity.weights(recipe)
    arguments = (recipe, weights, place)
    [wrong, *_] = gloo(2, norms_of, *arguments, blind_to, init=ACTIVE, env=ACTIVE_ENV)
    whole = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights.values()))
    assert abs(wrong["parameters"] - whole) > 1e-3 * whole
