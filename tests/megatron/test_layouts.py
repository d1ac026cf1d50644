"""Five families in parallel layouts against one rank, and a mistake for each kind of reduction.

The whole matrix is `make test-layouts` (tools/layouts.py); here is the part of it that CI runs.
"""

from __future__ import annotations

import pytest

from nxdt_nemo.testing.matrix import FAST, LAYOUTS, MISTAKES, TOLERANCE, recipe_of
from nxdt_nemo.testing.recipe import Recipe

pytestmark = pytest.mark.ranks

CASES = [(family, name) for family, names in FAST.items() for name in names.split()]


@pytest.mark.parametrize("family", ["mixtral", "bert", "t5"])
def test_one_rank_equals_upstream(parity, family):
    """The norm of late steps is the first thing to feel another order of sums: 1.3e-6 of a BERT's on one
    processor, where its losses differ by 2e-8 and the first step's gradients by 3e-7."""
    row = parity.against_stock(Recipe.of(family), TOLERANCE)
    assert row.good, row
    assert row.errors.loss <= 1e-6 and row.errors.grad <= 1e-6, row


@pytest.mark.parametrize("family", ["mixtral", "bert", "t5"])
def test_the_text_is_learned(parity, family):
    losses = parity.ours(*recipe_of(family, "one"))[0].losses
    assert losses[0] - losses[-1] > 0.5, losses


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_layout_equals_one_rank(parity, family, name):
    row = parity.against_one_rank(*recipe_of(family, name), TOLERANCE)
    assert row.good, row


@pytest.mark.parametrize(
    ("family", "name", "fault"),
    [case if case in MISTAKES[:4] else pytest.param(*case, marks=pytest.mark.slow) for case in MISTAKES],
)
def test_a_mistake_turns_the_row_red(parity, family, name, fault):
    row = parity.against_one_rank(*recipe_of(family, name), TOLERANCE, fault)
    assert row.verdict == "red, as it must", row


def test_the_fast_part_is_a_part_of_the_matrix():
    assert all(name in LAYOUTS[family].split() for family, name in CASES)
    assert len(CASES) < 12
    for family in ("gpt", "llama", "mixtral"):
        names = LAYOUTS[family].split()
        places = {name.partition("+grouped")[0].partition("+static")[0] for name in names} - {"one"}
        assert len(set(names)) == len(names) and len(places) >= 24
