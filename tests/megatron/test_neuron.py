"""megatron-core on a device that is not the CPU: the neuron lane's stand-in trains what the cpu lane trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.matrix import NEURON
from nxdt_nemo.testing.parity import Parity

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.mark.parametrize(("family", "place", "fault"), NEURON)
def test_equals_the_cpu_lane_unless_there_is_a_mistake(
    neuron_standin: Path, parity: Parity, family: Any, place: str, fault: Any
) -> None:
    row = parity.neuron_row(family, place, fault)
    assert row.good, row
