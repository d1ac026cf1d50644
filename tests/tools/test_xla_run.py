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

from xla_run_lib.runs import Counted, Job, losses  # noqa: E402


def part(name: str, **numbers: int) -> dict[str, Any]:
    return {"part": name, "compiled": 0, "read": 0, "arrived": 0, "logger": 0, "bar": 0, "drawn": 0} | numbers


def counted(folder: Path, *parts: dict[str, Any]) -> Counted:
    steps = sum(one["part"] == "step" for one in parts)
    (folder / "counts.json").write_text(json.dumps({"parts": parts, "seconds": [0.5] * steps}))
    return Counted.of(folder)


START = (part("set-up", compiled=4), part("step", compiled=1, read=1), part("between"), part("step", compiled=1))
VALIDATED = (part("between"), part("validation", compiled=7, read=9, logger=9, bar=9), part("between", compiled=1))
LATER = (part("between"), part("validation", read=9) | {"aten::_local_scalar_dense": 9}, part("between", read=3))
STEP = (part("step"), part("between"))


def test_a_run_as_it_should_be(tmp_path: Path) -> None:
    asks = part("between", logger=1, bar=1, drawn=1)
    gets = part("step", read=2, arrived=2) | {"aten::add": 0}
    found = counted(tmp_path, *START, *VALIDATED, *STEP, asks, gets, *LATER, part("end", compiled=1, read=50))
    assert (found.set_up, found.steps, found.validations, found.end) == (4, [1, 1, 0, 0], [8, 0], 1)
    assert (found.after_warm_up, found.unasked, found.warming, found.fallen) == (0, 0, 1, {})
    assert (found.logged, found.drawn, found.drawings) == (1, 1, 1)
    assert found.good and found.done == 4 and found.milliseconds == 500.0


@pytest.mark.parametrize(
    ("late", "what"),
    [
        (part("step", compiled=1), "after_warm_up"),
        (part("between", compiled=1), "after_warm_up"),
        (part("step", read=3, arrived=2), "unasked"),
        (part("between", read=1), "unasked"),  # a callback's, after the step
        (part("between", bar=2, drawn=1), "drawn"),
        (part("between", logger=2), "logged"),
        (part("step") | {"aten::nonzero": 1}, "fallen"),
        (part("step") | {"aten::_local_scalar_dense": 1}, "fallen"),
        (part("validation") | {"aten::nonzero": 1, "aten::_local_scalar_dense": 1}, "fallen"),
    ],
)
def test_each_fault_shows(tmp_path: Path, late: dict[str, Any], what: str) -> None:
    """Values that a validation asked for hide none that a step reads."""
    found = counted(tmp_path, *START, *VALIDATED, *STEP, *STEP, late, part("end"))
    assert getattr(found, what) and not found.good


def test_only_a_bar_without_a_loss_may_wait_for_one(tmp_path: Path) -> None:
    assert counted(tmp_path, *START, *STEP).good
    assert not counted(tmp_path, *START, part("between", read=1), *STEP).good


def test_a_third_validation_compiles_nothing(tmp_path: Path) -> None:
    again = (part("step"), part("between"), part("validation", compiled=1), part("between"), part("step"))
    assert counted(tmp_path, *START, *VALIDATED, *again, part("end")).good
    assert counted(tmp_path, *START, *VALIDATED, *again, *again, part("end")).after_warm_up == 1


def test_a_loss_that_is_no_number_is_not_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        code = 0

        def __init__(self, lane: str) -> None:
            self.lane = lane

        def curve(self, name: str = "") -> dict[int, float]:
            return {0: 2.0, 1: 1.0 if self.lane == "cpu" or name else float("nan")}

    monkeypatch.setattr("xla_run_lib.runs.run", lambda *_, environment, **__: Done(environment["NXDT_NEMO_RUNTIME"]))
    loss, validation, fell = losses(Job("llama", "fp32", 2, 1), tmp_path, tmp_path / "runs", print)
    assert (loss, validation, fell) == (float("inf"), 0.0, 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_a_short_run() -> None:
    """48 steps of the Llama, stopped in the middle and resumed."""
    chosen = ["--steps=48", "--equal=0", "--models=llama", "--precisions=fp32", "--no-stock"]
    run = subprocess.run([sys.executable, str(TOOLS / "xla_run.py"), *chosen], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.count("llama, ") == 2
