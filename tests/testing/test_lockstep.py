"""pytest on several ranks in lock step: what passes, fails, skips, hangs and dies, on a folder of small tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.testing.lockstep.coordinator import Coordinator, Limits, merged

pytestmark = pytest.mark.ranks

PASSES = """
import os
import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
IMPORTED_BY = os.getpid()

def up():
    if not dist.is_initialized():
        dist.init_process_group("gloo")

def test_the_ranks_are_there():
    up()
    found = torch.tensor(RANK)
    dist.all_reduce(found)
    assert found == WORLD * (WORLD - 1) // 2 and RANK == dist.get_rank()

def test_a_group_is_made_once():
    up()
    assert dist.new_group([0]) is dist.new_group([0])
    assert dist.new_group([0, 1]) is not dist.new_group([0])

def test_nothing_is_imported_again_for_a_rank():
    assert os.getpid() != IMPORTED_BY
"""
FAILS = """
import os, time
import pytest
import torch
import torch.distributed as dist

RANK = int(os.environ["RANK"])

def up():
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return torch.ones(1)

def test_one_fails_while_the_other_waits():
    x = up()
    assert RANK == 0, "rank 1 is off"
    dist.all_reduce(x)

def test_the_next_one_has_ranks():
    assert dist.is_initialized()
    x = up()
    dist.all_reduce(x)
    assert x == 2

def test_all_fail():
    assert False

def test_one_dies():
    if RANK == 1:
        os._exit(7)
    dist.all_reduce(up())

def test_one_hangs():
    while RANK == 1:
        time.sleep(0.1)

def test_one_skips():
    if RANK == 0:
        pytest.skip("not here")

def test_all_skip():
    pytest.skip("nowhere")

def test_a_wait_ends():
    x = up()
    dist.all_reduce(x)
    while True:
        dist.all_reduce(x) if RANK == 0 else time.sleep(0.1)

@pytest.fixture
def broken():
    yield
    assert RANK == 0

def test_teardown_fails_on_one(broken): ...
"""


TE = """
import transformer_engine as te
from transformer_engine.pytorch.fp8 import check_fp8_support, fp8_autocast

assert check_fp8_support()[0] is False
try:
    from transformer_engine.pytorch.optimizers import FusedAdam
except ImportError:
    pass
else:
    raise AssertionError
"""


def lockstep(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NXDT_", "PYTEST_"))}
    root = str(Path(__file__).parents[2])
    env = kept | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "nxdt_nemo.testing.lockstep", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Test -> (outcome, text), of one run of both files on two ranks."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_passes.py").write_text(PASSES)
    (folder / "test_fails.py").write_text(FAILS)
    (folder / "test_left_out.py").write_text("def test_left_out(): ...\n")
    words = ("--ranks=2", "--record=found.jsonl", "--test-timeout=10", "--wait-timeout=3", "--logs=logs")
    run = lockstep(folder, *words, "--", "-p", "no:cacheprovider", "-k", "not left_out")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "nxdt_nemo: cpu lane" in run.stdout
    assert "test session starts" in (folder / "logs" / "rank1.log").read_text()
    lines = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    assert {line["file"]: line["tests"] for line in lines if "file" in line} == {
        "test_fails.py": 9,
        "test_left_out.py": 0,
        "test_passes.py": 3,
    }
    return {line["test"].rpartition("::")[2]: (line["status"], line["text"]) for line in lines if "test" in line}


@pytest.mark.parametrize(
    "test, outcome, says",
    [
        ("test_the_ranks_are_there", "passed", ""),
        ("test_a_group_is_made_once", "passed", ""),
        ("test_nothing_is_imported_again_for_a_rank", "passed", ""),
        ("test_one_fails_while_the_other_waits", "failed", "rank 1 is off"),
        ("test_one_fails_while_the_other_waits", "failed", "rank 1 of 2, the first to fail"),
        ("test_the_next_one_has_ranks", "passed", ""),
        ("test_all_fail", "failed", "assert False"),
        ("test_one_dies", "failed", "rank 1: its process ended with code 7"),
        ("test_one_hangs", "failed", "ranks 1 hang after 10 s"),
        ("test_one_hangs", "failed", "in test_one_hangs"),
        ("test_one_skips", "passed", ""),
        ("test_all_skip", "skipped", "nowhere"),
        ("test_a_wait_ends", "failed", "imed out"),
        ("test_teardown_fails_on_one", "error", "rank 1 of 2"),
    ],
)
def test_outcomes(done, test, outcome, says):
    assert done[test][0] == outcome
    assert says in done[test][1]


def test_every_test_is_counted_once(done):
    assert len(done) == 12


def test_a_module_that_does_not_import_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import not_there\n")
    run = lockstep(tmp_path, "--ranks=2", "--record=found.jsonl", "--", "-p", "no:cacheprovider")
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert "No module named 'not_there'" in run.stdout
    (line,) = (tmp_path / "found.jsonl").read_text().splitlines()
    assert "No module named 'not_there'" in json.loads(line)["error"]
    assert json.loads(line)["file"] == "test_broken.py"


def test_a_view_for_the_tests_package_and_a_transformer_engine_without_fp8(tmp_path: Path) -> None:
    package = tmp_path / "cases"
    package.mkdir()
    (package / "__init__.py").write_text("")
    asks = "import torch\n\ndef test_cuda():\n    assert torch.zeros(1, device='cuda').device.type == 'cpu'\n"
    (package / "test_view.py").write_text(asks)
    (package / "test_te.py").write_text(f"{TE}{asks}")
    options = ("-p", "no:cacheprovider", "--continue-on-collection-errors", "--nxdt-view=cases")
    run = lockstep(tmp_path, "--ranks=1", "--", *options)
    assert "1 passed, 1 error" in run.stdout
    run = lockstep(tmp_path, "--ranks=1", "--", *options, "--nxdt-te=cases.test_te")
    assert "2 passed" in run.stdout
    run = lockstep(tmp_path, "--ranks=1", "--", *options[:-1], "--nxdt-te=cases.test_te")
    assert "passed" not in run.stdout


def report(outcome: str) -> dict[str, Any]:
    return {"outcome": outcome, "longrepr": {"sections": []}}


def test_of_several_ranks_the_first_failure_counts_then_a_pass() -> None:
    test = ("file.py::test", ("file.py", 1, "test"))
    assert merged(test, {2: [report("failed")], 0: [report("failed")], 1: [report("passed")]}, 3)[0]["longrepr"][
        "sections"
    ] == [("rank 2 of 3, the first to fail", "", "-")]
    assert merged(test, {0: [report("skipped")], 1: [report("passed")]}, 2)[0]["outcome"] == "passed"
    assert merged(test, {0: [report("skipped")], 1: [report("skipped")]}, 2)[0]["outcome"] == "skipped"


class _Pipe:
    def __init__(self, tests: list[Any]) -> None:
        self._tests = tests

    def recv(self) -> list[Any]:
        return self._tests


def test_ranks_that_collect_different_tests_are_refused() -> None:
    pipes: Any = [_Pipe([("a", ("a", 1, "a"))]), _Pipe([("b", ("b", 1, "b"))])]
    with pytest.raises(RuntimeError, match="collected different tests"):
        Coordinator(pipes, [], Limits()).serve()
