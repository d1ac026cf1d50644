"""The shared recipe: the same batches everywhere, a learning rate like NeMo's, layouts by name."""

from __future__ import annotations

import numpy as np
import pytest

from nxdt_nemo.testing.recipe import FAMILIES, Layout, Recipe, layout, micro_batches


def test_batches_come_from_the_seed_alone_and_differ_by_step():
    recipe = Recipe.of("gpt")
    first, again, later = (micro_batches(recipe, step) for step in (0, 0, 1))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].tokens, later[0].tokens)
    assert first[0].tokens.shape == (recipe.micro_batch, recipe.seq)
    assert len(first) == recipe.micro_batches


def test_labels_are_the_next_tokens():
    batch = micro_batches(Recipe.of("gpt"), 3)[1]
    assert np.array_equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_every_quarter_of_the_vocabulary_is_used():
    """Else a tensor-parallel shard of the embedding would never be looked at."""
    recipe = Recipe.of("llama")
    used = np.concatenate([batch.tokens.ravel() for batch in micro_batches(recipe, 0)])
    assert used.min() >= 0
    assert used.max() < recipe.vocab
    assert set(used // (recipe.vocab // 4)) == {0, 1, 2, 3}


def test_the_text_repeats_its_pairs():
    recipe = Recipe.of("gpt", micro_batches=64)
    pairs = {(a, b) for x in micro_batches(recipe, 0) for a, b in zip(x.tokens.ravel(), x.labels.ravel(), strict=True)}
    assert len(pairs) <= 64 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_learning_rate_rises_twice_then_falls_to_the_least(family):
    recipe = Recipe.of(family)
    rates = [recipe.lr_at(step) for step in range(recipe.steps + 1)]
    assert rates[:3] == pytest.approx([recipe.lr / 3, recipe.lr * 2 / 3, recipe.lr])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.min_lr)
    assert recipe.lr >= 1e-3
    assert recipe.warmup <= 2


TEXTS = ["one", "tp2", "tp2sp", "pp2", "tp2pp2", "dp2", "tp2sppp2dp2", "pp3first1last1", "pp2cut1-0-2-1vpp2"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_layout_prints_as_it_is_read(text):
    assert str(layout(text)) == text


def test_a_layouts_sizes():
    assert layout("tp2sppp2") == Layout(tp=2, pp=2, sp=True)
    assert layout("tp2pp2dp2").world == 8
    assert layout("pp2cut1-0-2-1vpp2").pipeline_layout == "Et||tt|tL"


@pytest.mark.parametrize("text", ["", "tp", "sp", "pp2tp2", "two"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match="is not like"):
        layout(text)
