"""Tokens one by one with a cache of one shape against the whole sequence at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.recipe import Layout, Recipe, layout

pytestmark = pytest.mark.ranks
PROMPT, LENGTH = 3, 12


def differences(recipe: Recipe, at: Layout) -> tuple[float, float]:
    """Of one rank: the largest difference of logits, and the same where the mask hides nothing."""
    from nxdt_nemo.megatron.inference.static_cache import StaticCache
    from nxdt_nemo.testing.ours import lane_here, set_up

    lane_here()
    model = set_up(recipe, None, at).model[0].eval()
    tokens = torch.randint(0, recipe.vocab, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(2, LENGTH)

    def one_by_one(sees_all: bool) -> torch.Tensor:
        cache, place = StaticCache(2, LENGTH), torch.tensor([PROMPT - 1])
        prompts = tokens.masked_fill(positions >= PROMPT, 0)
        model(prompts, positions, None, inference_context=cache)
        cache.decode(place)
        found = []
        for at in range(PROMPT - 1, LENGTH):
            place.fill_(at)
            mask = cache.hidden() & (not sees_all)
            found.append(model(tokens[:, at : at + 1], positions[:, at : at + 1], mask, inference_context=cache))
        return torch.cat(found, 1)

    with torch.no_grad():
        whole = model(tokens, positions, None)[:, PROMPT - 1 :]
        return tuple((one_by_one(sees_all) - whole).abs().max().item() for sees_all in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "family, at", [("llama", "one"), pytest.param("gpt", "one", marks=pytest.mark.slow), ("llama", "tp2")]
)
def test_one_by_one_is_all_at_once(gloo: Any, family: Any, at: str) -> None:
    where = layout(at)
    for right, wrong in gloo(
        where.world, differences, Recipe.of(family, layers=2), where, init=ACTIVE, env=ACTIVE_ENV, group=False
    ):
        assert right < 1e-5
        assert wrong > 1e-3
