"""tools/xla_run.py: what it makes of the counters, and, marked slow, a short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from xla_run_lib.runs import Counted  # noqa: E402


def part(name: str, **numbers: int) -> dict[str, Any]:
    return {"part": name, "compiled": 0, "read": 0, "asked": 0} | numbers


def counted(folder: Path, *parts: dict[str, Any]) -> Counted:
    steps = sum(one["part"] == "step" for one in parts)
    (folder / "counts.json").write_text(json.dumps({"parts": parts, "seconds": [0.5] * steps}))
    return Counted.of(folder)


START = (part("set-up", compiled=4), part("step", compiled=1), part("between"), part("step", compiled=1))
VALIDATED = (part("between"), part("validation", compiled=7, read=9), part("between", compiled=1))
LATER = (part("between"), part("validation"), part("between"))


def test_a_run_as_it_should_be(tmp_path: Path) -> None:
    read = part("step", read=2, asked=2) | {"aten::add": 0}
    found = counted(tmp_path, *START, *VALIDATED, read, *LATER, part("step"), part("end", compiled=1, read=50))
    assert (found.set_up, found.steps, found.validations, found.end) == (4, [1, 1, 0, 0], [8, 0], 1)
    assert (found.after_warm_up, found.asked, found.unasked, found.fallen) == (0, 2, 0, {})
    assert found.good and found.done == 4 and found.milliseconds == 500.0


@pytest.mark.parametrize(
    ("late", "what"),
    [
        (part("step", compiled=1), "after_warm_up"),
        (part("between", compiled=1), "after_warm_up"),
        (part("step", read=3, asked=2), "unasked"),
        (part("step") | {"aten::nonzero": 1}, "fallen"),
    ],
)
def test_each_fault_shows(tmp_path: Path, late: dict[str, Any], what: str) -> None:
    found = counted(tmp_path, *START, *VALIDATED, part("step"), part("between"), part("step"), late, part("end"))
    assert getattr(found, what) and not found.good


def test_a_third_validation_compiles_nothing(tmp_path: Path) -> None:
    again = (part("step"), part("between"), part("validation", compiled=1), part("between"), part("step"))
    assert counted(tmp_path, *START, *VALIDATED, *again, part("end")).good
    assert counted(tmp_path, *START, *VALIDATED, *again, *again, part("end")).after_warm_up == 1


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_a_short_run() -> None:
    """24 steps of the Llama, stopped in the middle and resumed."""
    chosen = ["--steps=24", "--equal=0", "--models=llama", "--precisions=fp32", "--no-stock"]
    run = subprocess.run([sys.executable, str(TOOLS / "xla_run.py"), *chosen], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.count("llama, ") == 2
