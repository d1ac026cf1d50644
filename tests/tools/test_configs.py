"""Some compositions, trained three steps by tools/configs.py; all of them: docs/results/configs.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "configs.py"

pytestmark = [pytest.mark.slow, pytest.mark.ranks]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("only", [("model=llama3_8b", "target=cpu"), ("model=bert",), ("model=t5",)], ids=" ".join)
def test_they_train(tmp_path, only):
    options = [option for entry in only for option in ("--only", entry)]
    done = subprocess.run(
        [sys.executable, str(TOOL), "--folder", str(tmp_path), *options],
        env=os.environ | {"NXDT_NEMO": ""}, capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "trained: " in done.stdout
