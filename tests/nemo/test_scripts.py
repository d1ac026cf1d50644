"""NVIDIA's own BERT and T5 scripts, unedited: each layout has one rank's losses, and T5 is tuned."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = os.environ.get("NXDT_NEMO_CHECKOUT", "")
TOOLS = Path(__file__).parents[2] / "tools"

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.slow,
    pytest.mark.ranks,
    pytest.mark.skipif(not CHECKOUT, reason="NXDT_NEMO_CHECKOUT names no checkout of NeMo v2.4.0"),
]


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("scripts_tool", TOOLS / "scripts.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("family", ["megatron_bert_pretraining", "megatron_t5"])
def test_rows_of_the_table(tool: Any, tmp_path: Path, family: str) -> None:
    data = tool.prepare(tmp_path / "data")
    rows = [row for row in tool.chosen([family], {}) if "seq2seq" not in row.name]
    assert len(rows) >= 3
    for row in rows:
        found = tool.verdict(row, Path(CHECKOUT), data, tmp_path / "rows")
        assert found[0] == "green", f"{row.name}: {found[1]}"
