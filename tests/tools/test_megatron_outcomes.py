"""What `make test-megatron` makes of its records: what has run, what counts, what the page says. No test is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import test_megatron as command  # noqa: E402
from upstream_lib.megatron import Log, Plan, load_plan  # noqa: E402
from upstream_lib.megatron_report import Result, as_markdown  # noqa: E402
from upstream_lib.outcomes import Kind, Outcome, Reason, Suite  # noqa: E402

FILE = "tests/unit_tests/a/test_b.py"


def written(path: Path, *lines: dict[str, Any]) -> Log:
    with path.open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)
    return Log.read(path)


def ran(name: str, status: str = "passed") -> dict[str, Any]:
    return {"test": f"{FILE}::{name}", "status": status, "seconds": 1, "when": "2026-01-01 10:00", "text": "E why"}


def test_a_file_has_run_when_all_its_tests_have(tmp_path: Path) -> None:
    path = tmp_path / "world1.jsonl"
    assert not Log.read(path).ran("a/test_b.py")
    assert not written(path, {"file": FILE, "tests": 2}, ran("one")).ran("a/test_b.py")
    assert not written(path, {"file": FILE, "tests": 1}, ran("one", "failed")).ran("a/test_b.py")  # run again
    log = written(path, ran("two"))
    assert log.ran("a/test_b.py")
    assert {name: outcome.status for name, outcome in log.outcomes.items()} == {
        f"{FILE}::one": "failed",
        f"{FILE}::two": "passed",
    }


def test_a_rank_that_the_kernel_ended_is_no_outcome(tmp_path: Path) -> None:
    ended = ran("one", "failed") | {"text": "rank 3: its process ended with code -9"}
    log = written(tmp_path / "log", {"file": FILE, "tests": 1}, ended)
    assert not log.outcomes
    assert not log.ran("a/test_b.py")


def test_a_file_without_tests_of_this_kind_has_run(tmp_path: Path) -> None:
    assert written(tmp_path / "log", {"file": FILE, "tests": 0}).ran("a/test_b.py")


def test_an_import_that_fails_is_one_error_until_it_does_not(tmp_path: Path) -> None:
    log = written(tmp_path / "log", {"file": FILE, "error": "E no such module", "when": "2026-01-01 09:00"})
    assert log.ran("a/test_b.py")
    assert log.outcomes == {FILE: Outcome("error", "E no such module")}
    log = written(tmp_path / "log", {"file": FILE, "tests": 1})
    assert not log.outcomes
    assert not log.ran("a/test_b.py")


def test_ranks_of_a_file() -> None:
    plan = Plan(((2, ("a/*.py",)), (8, ("a/test_b.py",))), (), ())
    files = ["a/test_b.py", "a/deep/test_c.py", "test_d.py"]
    assert {world: plan.files(world, files) for world in (1, 2, 8)} == {1: files[2:], 2: files[:2], 8: files[:1]}


def test_memory_of_a_file() -> None:
    plan = Plan((), (), (), {"a/*.py": 8, "a/test_b.py": 16})
    assert [plan.wants(file) for file in ("a/test_b.py", "a/test_c.py", "test_d.py")] == [16, 8, 0]
    assert command._fitting(plan, ["a/test_b.py", "test_d.py"])[-1] == "test_d.py"


def test_the_plan_is_in_order() -> None:
    plan = load_plan(command.PLAN)
    assert [world for world, _ in plan.ranks] == [1, 2, 4, 8]
    assert len({reason.cause for reason in plan.reasons}) == len(plan.reasons)


def test_an_unknown_number_of_ranks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('te = []\nreason = []\nmemory = {}\n[ranks]\n3 = ["*"]\n')
    with pytest.raises(ValueError, match=r"plan\.toml: ranks 3 is not one of 1, 2, 4, 8"):
        load_plan(path)


def page(kind: Kind, missing: list[str]) -> tuple[Result, str]:
    good, bad = Outcome("passed"), Outcome("failed", "E  needs kernels")
    worlds = {1: {f"{FILE}::one": good, f"{FILE}::two": bad}, 8: {f"{FILE}::one": bad}}
    reason = Reason("kernels", kind, "CUDA's", "two", "kernels")
    found = Result(
        Suite(worlds, [reason]),
        {1: [], 8: missing},
        ["2026-01-01 10:00", "2026-01-02 10:00"],
        {"c/test_d.py": 8}.__getitem__,
    )
    return found, as_markdown(found)


def test_the_page(tmp_path: Path) -> None:
    found, text = page("not applicable", ["c/test_d.py"])
    assert not found.suite.good  # it failed on 8 ranks, and no reason fits
    assert "run from 2026-01-01 10:00 to 2026-01-02 10:00" in text
    for row in ("| 1 | 1 | 0 | 0 | 1 | 2 |", "| 8 | 0 | 1 | 0 | 0 | 1 |", "| all | 0 | 1 | 0 | 1 | 2 |"):
        assert row in text
    assert "Not run to their end on 8 ranks: `c/test_d.py` (wants 8 GB of memory)." in text
    assert "- kernels (not applicable): `a/test_b.py` (1)" in text
    assert "- **unexplained**: `a/test_b.py::one`" in text
    assert "Not run" not in page("open", [])[1]
    assert "- kernels (open): `a/test_b.py::two`" in page("open", [])[1]
