"""Layouts of NeMo's YAML models against one rank: interleaved pipelines, experts, context parallelism, KV copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nxdt_nemo.testing.matrix import NEMO, NemoRow
from nxdt_nemo.testing.parity import Parity

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def parity() -> Iterator[Parity]:
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    with Parity() as session:
        yield session


ROWS = [pytest.param(row, id=f"{row.family}-{row.name}-{row.optimizer}") for row in NEMO[:1]]
ROWS += [pytest.param(row, id=f"{row.family}-{row.name}-{row.optimizer}", marks=pytest.mark.slow) for row in NEMO[1:]]


@pytest.mark.parametrize("row", ROWS)
def test_a_layout_equals_one_rank(parity, row: NemoRow):
    found = parity.nemo_row(row)
    assert found.good, found
