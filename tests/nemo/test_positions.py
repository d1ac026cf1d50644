"""ALiBi in a NeMo run, whose key megatron-core alone would take for no positions."""

from __future__ import annotations

import pytest

from nxdt_nemo.testing.matrix import TOLERANCE
from nxdt_nemo.testing.parity import Parity, errors
from nxdt_nemo.testing.recipe import Layout, Recipe, layout


@pytest.mark.slow
@pytest.mark.ranks
def test_alibi_on_two_ranks_is_one_ranks(parity: Parity) -> None:
    recipe = Recipe.of("llama", steps=4)
    one, _, _ = parity.nemo(recipe, Layout(), model__position_embedding_type="alibi")
    two, copies, _ = parity.nemo(recipe, layout("tp2"), model__position_embedding_type="alibi")
    none, _, _ = parity.nemo(recipe, Layout(), model__position_embedding_type="none")
    assert errors(two, one, copies).worst < TOLERANCE
    assert errors(none, one, 0.0).loss > 10 * TOLERANCE
