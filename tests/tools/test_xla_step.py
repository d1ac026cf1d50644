"""tools/bench/xla_step.py runs, and its variants train alike: it says so before it times. No time is judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench" / "xla_step.py"


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.usefixtures("with_torch_xla")
def test_a_row_of_the_lane_and_one_of_eager() -> None:
    chosen = ["--settings=128", "--pairs=2"]
    run = subprocess.run([sys.executable, str(TOOL), *chosen], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in run.stderr, run.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| 128 ")]
    assert [row[2] for row in rows][:2] == ["the xla lane", "the cpu lane, eager"] and len(rows) == 4
    assert rows[0][5:7] == ["2", "0"]  # graphs, and those that came later
