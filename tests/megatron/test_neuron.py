"""megatron-core on a device that is not the CPU: the neuron lane's stand-in trains what the cpu lane trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.parity import Parity
from nxdt_nemo.testing.recipe import Recipe, layout

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

ROWS = [
    ("gpt", "one"),
    ("gpt", "tp2"),
    ("gpt", "tp2sp"),
    ("llama", "tp2sp"),
    ("gpt", "dp2"),
    ("gpt", "dp2+zero"),
    ("gpt", "pp2"),
    ("mixtral", "ep2dp2"),
]


@pytest.mark.parametrize(("family", "place"), ROWS)
def test_equals_the_cpu_lane(neuron_standin: Path, parity: Parity, family: Any, place: str) -> None:
    row = parity.neuron_against_cpu(Recipe.of(family, layers=2, steps=10), layout(place), 1e-6)
    assert row.good, row


def test_a_mistake_shows(neuron_standin: Path, parity: Parity) -> None:
    recipe = Recipe.of("gpt", layers=2, steps=10)
    row = parity.neuron_against_cpu(recipe, layout("tp2sp"), 1e-6, "norm gradients not reduced")
    assert row.good, row
