"""Interleaved pipelines and experts through all of NeMo: layouts of YAML models against one rank.

NeMo takes both with megatron_amp_O2 in bf16 only, so that a row is held to twice what another order of sums changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.parity import Parity

pytestmark = pytest.mark.ranks

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt", "pp2vpp2", {}),
    ("mixtral", "ep2dp2", {}),
    ("llama", "pp2vpp2", {}),
    ("gpt", "pp2first1", {}),
    ("gpt", "tp2sppp2vpp2", {}),
    ("mixtral", "tp2sp", {}),
    ("mixtral", "ep2dp2", {"model__optim__name": "mcore_distributed_optim"}),
    ("mixtral", "tp2spep2dp2", {"model__optim__name": "mcore_distributed_optim"}),
]
FAST = ROWS[:2]
CONTEXT = [("gpt", "cp2"), ("llama", "tp2cp2")]


@pytest.fixture(scope="module")
def parity() -> Iterator[Parity]:
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    with Parity() as session:
        yield session


@pytest.mark.parametrize(
    ("family", "name", "changes"), [row if row in FAST else pytest.param(*row, marks=pytest.mark.slow) for row in ROWS]
)
def test_a_layout_is_as_close_as_another_order_of_sums(parity, family, name, changes):
    recipe, place = recipe_of(family, name)
    half = replace(recipe, dtype="bfloat16")
    row = parity.nemo_against_one_rank(half, place, parity.order_noise(half).times(2), **changes)
    assert row.good, row


@pytest.mark.parametrize(
    ("family", "name"), [CONTEXT[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in CONTEXT[1:])]
)
def test_context_parallel_ranks_equal_one(parity, family, name):
    """In float32. NeMo scales the loss by the context parallel size, and megatron-core once more."""
    row = parity.nemo_against_one_rank(*recipe_of(family, name), 1e-5)
    assert row.good, row
