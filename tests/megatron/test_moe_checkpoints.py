"""Grouped experts in distributed checkpoints: either layout of the experts goes on from what the other wrote.

With expert parallelism upstream has an optimizer for the experts alone, under a name of its own: sizes 1 and more do
not read each other's moments, sequential or grouped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nxdt_nemo.testing.parity import Parity, relative
from nxdt_nemo.testing.recipe import Recipe, layout

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

RECIPE = Recipe.of("mixtral", steps=6, layers=2)
HALF = 3


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("ep2dp2+grouped", "ep2dp2"),
        ("ep2dp2", "ep2dp2+grouped"),
        ("ep2dp2+zero", "ep2dp2+zero+grouped"),
        ("ep2dp2+zero+grouped", "ep4dp4+zero"),
        ("tp2spep2etp1+grouped", "ep2dp2"),
        ("one", "tp2sp+grouped"),
    ],
)
def test_a_run_goes_on(parity: Parity, tmp_path: Path, writer: str, reader: str) -> None:
    """Losses and norms of the second half, with the first half's Adam moments, are those of one run of one rank."""
    parity.leg(RECIPE, layout(writer), range(HALF), save=tmp_path / "half")
    resumed = parity.leg(RECIPE, layout(reader), range(HALF, RECIPE.steps), resume=tmp_path / "half")
    whole, _ = parity.ours(RECIPE, layout("one"))
    assert relative(resumed.losses, whole.losses[HALF:]) < 1e-6
    assert relative(resumed.grad_norms, whole.grad_norms[HALF:]) < 1e-5


def test_moments_that_are_not_read_would_be_seen(parity: Parity, tmp_path: Path) -> None:
    parity.leg(RECIPE, layout("one+grouped"), range(HALF), save=tmp_path / "half")
    arguments = {"resume": tmp_path / "half", "fault": "moments not resumed"}
    resumed = parity.leg(RECIPE, layout("one"), range(HALF, RECIPE.steps), **arguments)
    whole, _ = parity.ours(RECIPE, layout("one"))
    assert relative(resumed.losses, whole.losses[HALF:]) > 1e-4
