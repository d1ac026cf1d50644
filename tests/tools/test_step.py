"""tools/bench/step.py runs, and its sides train alike. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench" / "step.py"


@pytest.mark.ranks
def test_ours_beside_stock() -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    chosen = ["--settings=256", "--families=gpt", "--variants=ours,eager", "--pairs=1"]
    run = subprocess.run([sys.executable, str(TOOL), *chosen], capture_output=True, text=True, timeout=300)
    found = json.loads(run.stdout.splitlines()[-1])["results"]["256"]["gpt"]
    first, other = (side["losses"] for side in found.values())
    assert len(found) == 2 and len(first) == len(other) > 1
    assert all(abs(mine - its) <= 2e-5 * its for mine, its in zip(first, other, strict=True))
