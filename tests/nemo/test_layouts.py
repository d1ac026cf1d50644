"""Layouts of NeMo's YAML models against one rank: interleaved pipelines, experts, context parallelism, KV copies."""

from __future__ import annotations

import pytest

from nxdt_nemo.testing.matrix import NEMO, NemoRow

pytestmark = pytest.mark.ranks


ROWS = [pytest.param(row, id=f"{row.family}-{row.name}-{row.optimizer}") for row in NEMO[:1]]
ROWS += [pytest.param(row, id=f"{row.family}-{row.name}-{row.optimizer}", marks=pytest.mark.slow) for row in NEMO[1:]]


@pytest.mark.parametrize("row", ROWS)
def test_a_layout_equals_one_rank(parity, row: NemoRow):
    found = parity.nemo_row(row)
    assert found.good, found
