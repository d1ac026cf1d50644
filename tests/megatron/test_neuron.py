"""megatron-core on a device that is not the CPU: the neuron lane's stand-in trains what the cpu lane trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.matrix import NEURON
from nxdt_nemo.testing.parity import Parity
from nxdt_nemo.testing.recipe import Recipe, layout

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.mark.parametrize(("family", "place"), NEURON)
def test_equals_the_cpu_lane(neuron_standin: Path, parity: Parity, family: Any, place: str) -> None:
    row = parity.neuron_against_cpu(Recipe.of(family, layers=2, steps=10), layout(place), 1e-6)
    assert row.good, row


def test_a_mistake_shows(neuron_standin: Path, parity: Parity) -> None:
    recipe = Recipe.of("gpt", layers=2, steps=10)
    row = parity.neuron_against_cpu(recipe, layout("tp2sp"), 1e-6, "norm gradients not reduced")
    assert row.good, row
