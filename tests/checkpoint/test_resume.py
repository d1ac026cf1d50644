"""Training goes on where stock megatron-core left it, after the checkpoint went through other layouts.

Upstream's own code writes, trains and resumes; between them there is only the converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.testing.recipe import Recipe
from nxdt_nemo.testing.reference import STOCK_ENV

from .conftest import KINDS

TRAIN = "nxdt_nemo.testing.reference:train"
ROUTES = [
    [("torch_dist", Layout(tp=4, pp=2))],
    [("torch", Layout(tp=2, pp=2, vpp=2)), ("torch_dist", Layout(tp=1, pp=4))],
]


def config_of(recipe: Recipe) -> dict[str, Any]:
    """The config.json of a recipe's model: megatron-core alone writes no arguments."""
    common = {"vocab_size": recipe.vocab}
    if recipe.family == "gpt":
        gpt = {"n_embd": recipe.hidden, "n_layer": recipe.layers, "n_head": recipe.heads, "n_positions": recipe.seq}
        return {"model_type": "gpt2", "n_inner": recipe.ffn, "activation_function": "gelu", **gpt, **common}
    llama = {"num_attention_heads": recipe.heads, "num_key_value_heads": recipe.kv_groups, "hidden_size": recipe.hidden}
    sizes = {"intermediate_size": recipe.ffn, "num_hidden_layers": recipe.layers, "max_position_embeddings": recipe.seq}
    return {"model_type": "llama", **llama, **sizes, **common}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_loss_curve_continues(family: Any, gloo: Callable[..., Any], tmp_path: Path) -> None:
    recipe = Recipe.of(family, steps=6)

    def train(*arguments: Any) -> Any:
        return gloo(1, TRAIN, recipe, *arguments, env=STOCK_ENV)[0]

    weights = gloo(1, "nxdt_nemo.testing.reference:initial_weights", recipe, env=STOCK_ENV)[0]
    whole = train(weights)
    saved = tmp_path / "saved"
    train(weights, None, None, "matrices", range(3), None, saved)
    (tmp_path / "config.json").write_text(json.dumps(config_of(recipe)))
    for number, route in enumerate(ROUTES):
        at, options = saved, Options(config=tmp_path / "config.json", optimizer=True)
        for step, (to, layout) in enumerate(route):
            target = tmp_path / f"{number}.{step}"
            wanted = Target(layout, kinds=KINDS, extra={"optimizer_format": "model_space"})
            convert(at, target, to, options, wanted)
            at, options = target, Options(optimizer=True)
        rest = train(weights, None, None, "matrices", range(3, 6), at / "release", None)
        worst = max(abs(a - b) / b for a, b in zip(rest.losses, whole.losses[3:], strict=True))
        assert worst <= 1e-6, (route, worst)
        assert all(torch.equal(rest.weights[name], whole.weights[name]) for name in whole.weights)
    # the control: from the initial weights the same steps give other losses
    fresh = train(weights, None, None, "matrices", range(3, 6))
    assert max(abs(a - b) / b for a, b in zip(fresh.losses, whole.losses[3:], strict=True)) > 1e-3
