"""The backend against stock megatron-core, and its layouts against one rank: losses, grad norms, gradients.

A row is green when the worst relative error of 20 losses, 20 grad norms and every parameter's step-1 gradient is
within the tolerance. The negative controls show that such an error would be seen.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nxdt_nemo.testing.parity import Row, relative
from nxdt_nemo.testing.recipe import FAMILIES, Layout, Recipe, layout

pytestmark = pytest.mark.ranks

UPSTREAM = 1e-6
ONE_RANK = {"gpt": 1e-6, "llama": 1e-5}
GOLDEN = Path(__file__).with_name("golden")

FAST = [("gpt", "tp2sp"), ("gpt", "pp2"), ("gpt", "dp2"), ("llama", "tp2sp"), ("llama", "pp2"), ("llama", "dp2")]
SLOW = [("gpt", "tp2"), ("gpt", "tp2pp2"), ("gpt", "tp2sppp2"), ("gpt", "pp4"), ("gpt", "tp4sp"), ("gpt", "tp2dp2")]
SLOW += [("llama", name) for _, name in SLOW]
FAULTS = [  # what is done wrong, in which layout
    ("norm gradients not reduced", "tp2sp"),
    ("one gradient x 1.01", "tp2"),
]


def assert_good(row: Row) -> None:
    assert row.good, f"{row.family}: {row.left} against {row.right}: {row.errors}, tolerance {row.tolerance}"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_equals_upstream(parity, family):
    assert_good(parity.against_stock(Recipe.of(family), UPSTREAM))


@pytest.mark.parametrize(("family", "name"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_layout_equals_one_rank(parity, family, name):
    assert_good(parity.against_one_rank(Recipe.of(family), layout(name), ONE_RANK[family]))


@pytest.mark.parametrize("family", ["gpt", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("fault", "name"), FAULTS)
def test_a_mistake_turns_the_row_red(parity, family, fault, name):
    row = parity.against_one_rank(Recipe.of(family), layout(name), ONE_RANK[family], fault)
    assert row.verdict == "red, as it must"
    assert min(row.errors.norm, row.errors.grad) > row.tolerance, row.errors


def test_a_missing_reduction_shows_in_the_loss_alone(parity):
    row = parity.against_one_rank(Recipe.of("gpt"), layout("tp2sp"), 1e-6, "norm gradients not reduced")
    assert row.errors.loss > 1e-4, row.errors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_learned(parity, family):
    """Else a parity of losses says nothing about the optimizer."""
    losses = parity.ours(Recipe.of(family), Layout())[0].losses
    assert losses[0] - losses[-1] > 1.0, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_one_on_record(parity, family):
    """Golden: upstream's own losses, in full digits. Another machine's kernels may differ in the last ones.

    NXDT_NEMO_WRITE_GOLDEN=1 writes them anew; do that only when the recipe or upstream's version changes.
    """
    trained, file = parity.stock(Recipe.of(family)), GOLDEN / f"{family}.json"
    if os.environ.get("NXDT_NEMO_WRITE_GOLDEN") == "1":
        GOLDEN.mkdir(exist_ok=True)
        record = {"losses": trained.losses, "grad_norms": trained.grad_norms}
        file.write_text(json.dumps(record, indent=1) + "\n")
    golden = json.loads(file.read_text())
    assert relative(trained.losses, golden["losses"]) <= 1e-6
    assert relative(trained.grad_norms, golden["grad_norms"]) <= 1e-5
