"""tools/xla_run.py: what it makes of the counters, and, marked slow, a short run of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from xla_run_lib.runs import Counted, Job, apart  # noqa: E402
from xla_run_lib.runs import counted as run_and_count  # noqa: E402

from nxdt_nemo.testing.script_run import write_corpus  # noqa: E402


def part(name: str, **numbers: float) -> dict[str, Any]:
    return {"part": name, "compiled": 0, "read": 0, "logger": 0, "bar": 0, "arrived": 0, "seconds": 0.1} | numbers


def counted(folder: Path, *parts: dict[str, Any]) -> Counted:
    (folder / "counts.json").write_text(json.dumps(parts))
    return Counted.of(folder)


STEP = (part("step"), part("between"))
START = (
    part("set-up", compiled=4),
    part("step", compiled=1),
    part("between", read=1) | {"aten::_local_scalar_dense": 1},
    part("step", compiled=1),
    part("between", logger=2, bar=2),
)
VALIDATED = (
    part("validation", compiled=7, read=9) | {"aten::_local_scalar_dense": 9},
    part("between", compiled=2, read=50),
)
LATER = (*STEP, part("validation", read=9), part("between", read=50))
RUN = (*START, *VALIDATED, part("step", read=4, arrived=4), *LATER, *LATER, *LATER)
END = part("end", compiled=1, read=50)


def test_a_run_as_it_should_be(tmp_path: Path) -> None:
    found = counted(tmp_path, *RUN, END)
    assert (found.set_up, found.steps, found.end) == (4, [1, 1, 0, 0, 0, 0], 1)
    assert (found.validations, found.saves) == ([7, 0, 0, 0], [2, 0, 0, 0])
    assert (found.logged, found.most_logged, found.drawn, found.unasked, found.fallen) == (2, 2, 2, 0, {})
    assert found.good and found.after_warm_up == 0 and found.milliseconds == pytest.approx(200)


@pytest.mark.parametrize(
    "late",
    [
        [part("step", compiled=1)],
        [part("step"), part("between", compiled=1)],
        [*STEP, part("validation", compiled=1), part("between")],
        [*STEP, part("validation"), part("between", compiled=1)],
    ],
    ids=["step", "after it", "validation", "save"],
)
def test_nothing_compiles_after_the_warm_up(tmp_path: Path, late: list[dict[str, Any]]) -> None:
    found = counted(tmp_path, *RUN, *late, END)
    assert found.after_warm_up == 1 and not found.good


def test_the_end_compiles_no_more_than_it_needs(tmp_path: Path) -> None:
    assert not counted(tmp_path, *RUN, END | {"compiled": 2}).good


@pytest.mark.parametrize("reader", ["step", "between"])
def test_a_reading_that_nobody_asked_for(tmp_path: Path, reader: str) -> None:
    """In a step or after it, where the preemption callback reads; values asked for in validations do not hide it."""
    asked = (part("step"), part("between"), part("validation", logger=500, arrived=500, read=500), part("between"))
    late = [part(name, read=int(name == reader)) for name in ("step", "between")]
    found = counted(tmp_path, *RUN, *asked, *late, END)
    assert found.unasked == 1 and not found.good


@pytest.mark.parametrize("asker", ["logger", "bar"])
def test_one_that_asks_at_every_step(tmp_path: Path, asker: str) -> None:
    every = [part("step", read=2, arrived=2, **{asker: 2})] * 50
    found = counted(tmp_path, *RUN, *every, END)
    assert found.unasked == 0 and not found.good


@pytest.mark.parametrize("where", ["set-up", "step", "between", "validation", "end"])
def test_an_operation_off_xla_in_any_part(tmp_path: Path, where: str) -> None:
    at = [one["part"] for one in (*RUN, END)].index(where)
    parts = [*RUN, END]
    parts[at] = parts[at] | {"aten::nonzero": 99}
    found = counted(tmp_path, *parts)
    assert found.fallen == {"aten::nonzero": 99} and not found.good


def test_two_validations_are_no_proof(tmp_path: Path) -> None:
    """All of them would be warm-up."""
    short = (*START, *VALIDATED, part("step", read=4, arrived=4), *LATER)
    assert not counted(tmp_path, *short, END).good


def test_a_loss_that_is_no_number_is_not_equal() -> None:
    finite = {0: 2.0, 1: 1.0}
    assert apart(finite, {0: 2.0, 1: 1.25}) == 0.25
    assert apart(finite, finite | {1: math.nan}) == apart(finite | {1: math.nan}, finite) == math.inf


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_a_short_run() -> None:
    """40 steps of the Llama, stopped in the middle and resumed."""
    chosen = ["--steps=40", "--equal=0", "--models=llama", "--precisions=fp32", "--no-stock"]
    run = subprocess.run([sys.executable, str(TOOLS / "xla_run.py"), *chosen], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.count("llama, ") == 2


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_upstreams_preemption_callback_is_seen(tmp_path: Path) -> None:
    """Negative control: without our record it reads its flag back after each step."""
    job = Job("llama", "fp32", 20, 5, without="preemption-flag")
    done, found = run_and_count(job, write_corpus(tmp_path / "corpus"), tmp_path / "run")
    assert done.code == 0 and found is not None, done.output[-2000:]
    assert found.unasked == 20 and not found.good


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
def test_a_validation_that_is_not_the_best_compiles_nothing(tmp_path: Path) -> None:
    """Lightning compares it with the best one so far, and asks all ranks."""
    corpus = write_corpus(tmp_path / "corpus")
    for steps in (20, 40):
        job = Job("gpt", "bf16", steps, 4, keys=("model.optim.lr=0.3",))
        done, found = run_and_count(job, corpus, tmp_path / "run")
        assert done.code == 0 and found is not None, done.output[-2000:]
        assert found.good and not any(found.saves[1:])
    curve = [*done.curve("val_loss").values()]
    assert any(later > min(curve[:place]) for place, later in enumerate(curve) if place), "each was the best"
