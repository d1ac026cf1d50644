"""NeMo's padding masks in a T5: its cross attention's pair is one mask, and its decoder stays causal under its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nxdt_nemo.megatron.models.T5.t5_model import forward
from nxdt_nemo.testing import ours
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout, Recipe, micro_batches


def given(mask: Any, place: int = 5) -> Any:
    """The mask that upstream's forward gets: 4 of the decoder, 5 of cross attention."""
    masks = [mask if number == place else None for number in (3, 4, 5)]
    return forward(lambda *args: args[place], None, None, None, *masks)


def test_a_token_sees_what_is_padding_on_neither_side() -> None:
    decoder = torch.tensor([[False, True]]).view(1, 1, 1, 2)
    encoder = torch.tensor([[False, False, True]]).view(1, 1, 1, 3)
    assert given((decoder, encoder)).tolist() == [[[[False, False, True], [True, True, True]]]]


def test_one_mask_stays_as_it_is() -> None:
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    assert given(mask) is mask
    assert given(None) is None
    assert given(mask, 4) is mask
    assert given(mask[:, :, :1], 4) is None


@pytest.mark.ranks
def test_a_decoder_with_padding_sees_no_later_token(gloo: Gloo) -> None:
    """Megatron-LM's loader hands the causal rule in a mask of its own: the same logits, where they are of tokens."""
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    (found,) = gloo(1, logits, init=ours.ACTIVE, env=ours.ACTIVE_ENV)
    nemo, later, whole = (found[name] for name in ("nemo", "later", "whole"))
    assert torch.equal(nemo[:, :-1], later[:, :-1]) and not torch.equal(nemo[:, -1], later[:, -1])
    torch.testing.assert_close(nemo, whole, rtol=1e-5, atol=1e-6)


def logits() -> dict[str, torch.Tensor]:
    """Of NeMo's masks, of them with another last token, and of a causal mask."""
    recipe, layout = Recipe.of("t5"), Layout()
    (model,) = ours._stages(recipe, layout, ours._model_parallel(recipe, layout))
    batch = micro_batches(recipe, 0)[0]
    tokens, decoder = torch.as_tensor(batch.tokens), torch.as_tensor(batch.decoder)
    hidden = torch.as_tensor(batch.real)[:, None, None] == 0
    none, other = torch.zeros_like(decoder)[:, None, None] > 0, decoder.clone()
    other[:, -1] = (other[:, -1] + 1) % recipe.vocab
    ahead = torch.ones(2 * decoder.shape[-1:], dtype=torch.bool).triu(1).expand(len(decoder), 1, -1, -1)
    with torch.no_grad():
        asked = {"nemo": (decoder, none), "later": (other, none), "whole": (decoder, ahead)}
        found = {name: model(tokens, row, hidden, mask, (none, hidden)) for name, (row, mask) in asked.items()}
    ours.forget_groups()
    return found
