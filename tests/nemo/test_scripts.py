"""NVIDIA's own BERT and T5 scripts, unedited: each layout has one rank's losses, and T5 learns answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHECKOUT = os.environ.get("NXDT_NEMO_CHECKOUT", "")

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.slow,
    pytest.mark.ranks,
    pytest.mark.skipif(not CHECKOUT, reason="NXDT_NEMO_CHECKOUT names no checkout of NeMo v2.4.0"),
]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("scripts")


@pytest.mark.parametrize("family", ["megatron_bert_pretraining", "megatron_t5"])
def test_rows_of_the_table(tool: Any, tmp_path: Path, family: str) -> None:
    data = tool.prepare(tmp_path / "data")
    rows = tool.chosen([family], {})
    assert len(rows) >= 3
    for row in rows:
        found = tool.verdict(row, Path(CHECKOUT), data, tmp_path / "rows")
        assert found[0] == "green", f"{row.name}: {found[1]}"
