"""What `make test-upstream` makes of two runs: counts, reasons, and when it must fail. No test of NVIDIA's is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import test_upstream as command  # noqa: E402
from upstream_lib.outcomes import Comparison, Kind, Outcome, Reason, load_reasons, read_junit  # noqa: E402
from upstream_lib.report import as_markdown, show  # noqa: E402

PASSED, BROKEN, SKIPPED = Outcome("passed"), Outcome("failed", "E  needs a hub"), Outcome("skipped", "no GPU")


def reason(kind: Kind, tests: str = ".", says: str = "hub") -> Reason:
    return Reason("hub", kind, "there is no network", tests, says)


SUITE = """
import pytest

def test_passes(): pass
def test_fails(): assert False, "as it should"
@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass
@pytest.mark.parametrize("x", [1, "a.b"])
class TestClass:
    def test_it(self, x): pass
@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown")
def test_passes_and_then_breaks(broken): pass
"""


@pytest.fixture(scope="module")
def junit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_some.py").write_text(SUITE)
    (folder / "tests" / "test_gone.py").write_text("import there_is_no_such_module\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    run = ("-m", "pytest", "-q", "--continue-on-collection-errors", "--junitxml=found.xml", "tests")
    subprocess.run([sys.executable, *run], cwd=folder, capture_output=True, check=False)
    return read_junit(folder / "found.xml")


def test_pytests_own_file_is_read(junit: dict[str, Outcome]) -> None:
    assert {test: outcome.status for test, outcome in junit.items()} == {
        "tests/test_gone.py": "error",
        "tests/test_some.py::test_passes": "passed",
        "tests/test_some.py::test_fails": "failed",
        "tests/test_some.py::test_skipped": "skipped",
        "tests/test_some.py::TestClass::test_it[1]": "passed",
        "tests/test_some.py::TestClass::test_it[a.b]": "passed",
        "tests/test_some.py::test_passes_and_then_breaks": "error",
    }
    assert "there_is_no_such_module" in junit["tests/test_gone.py"].text
    assert "as it should" in junit["tests/test_some.py::test_fails"].text


VERDICTS = [  # on stock, through us, reasons, lost, unexplained
    (PASSED, PASSED, [], 0, 0),
    (BROKEN, PASSED, [], 0, 0),
    (BROKEN, BROKEN, [], 0, 1),
    (BROKEN, BROKEN, [reason("upstream")], 0, 0),
    (BROKEN, BROKEN, [reason("upstream", tests="other")], 0, 1),
    (BROKEN, BROKEN, [reason("upstream", says="other")], 0, 1),
    (BROKEN, BROKEN, [reason("removed")], 0, 1),
    (PASSED, BROKEN, [reason("not applicable")], 1, 0),
    (PASSED, SKIPPED, [], 1, 0),
    (PASSED, None, [], 1, 0),
]


@pytest.mark.parametrize("stock, ours, reasons, lost, unexplained", VERDICTS)
def test_verdict(stock: Outcome, ours: Outcome | None, reasons: list[Reason], lost: int, unexplained: int) -> None:
    sides = {"other": PASSED, "tests/a.py::t": stock}, {"other": PASSED} | ({"tests/a.py::t": ours} if ours else {})
    found = Comparison(*sides, reasons)
    assert (len(found.lost), len(found.unexplained)) == (lost, unexplained)
    assert found.good == (lost == unexplained == 0)


def test_nothing_run_is_not_good() -> None:
    assert not Comparison({}, {}, []).good


def test_counts_add_up_and_not_applicable_counts_once() -> None:
    ours = {"a/1": PASSED, "a/2": BROKEN, "b/3": SKIPPED, "b/4": Outcome("error", "E  else")}
    found = Comparison(ours, ours, [reason("not applicable")])
    assert found.counts("ours") == {"passed": 1, "not applicable": 2, "error": 1}
    assert found.counts("ours", "b/") == {"not applicable": 1, "error": 1}
    assert found.statuses("ours") == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}


def test_a_mistake_in_the_reasons_is_said(tmp_path: Path) -> None:
    path = tmp_path / "reasons.toml"
    path.write_text('[[reason]]\ncause = "c"\nkind = "whatever"\nwhy = ""\ntests = ""\nsays = ""\n')
    with pytest.raises(ValueError, match=r"reasons.toml: 'c': kind 'whatever' is not one of"):
        load_reasons(path)


def test_our_reasons_are_read() -> None:
    assert {found.kind for found in load_reasons(command.REASONS)} <= {"not applicable", "upstream", "open", "removed"}


def test_each_remaining_failure_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    known, unknown = "tests/utils/a.py::known[x]", "tests/utils/a.py::unknown"
    ours = {known: BROKEN, unknown: Outcome("failed", "E  other")}
    found = Comparison({known: BROKEN, unknown: PASSED}, ours, [reason("not applicable")])
    show(found, Console(width=200))
    printed = capsys.readouterr().out
    assert f"{known}: hub (not applicable)" in printed and f"UNEXPLAINED {unknown}: other" in printed
    assert f"LOST {unknown}" in printed and "lost through us: 1; unexplained: 1." in printed
    page = as_markdown(found, "the command", command.datetime.now(command.UTC))
    assert "`utils/a.py::known[x]`" in page and f"**lost**: `{unknown}`" in page
    assert "| tests/utils | 1 / 0 | 0 / 1 | 0 / 0 | 1 / 1 |" in page


@pytest.mark.parametrize("ours, code", [(PASSED, 0), (BROKEN, 1)])
def test_the_command_fails_when_a_test_is_lost(
    ours: Outcome, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command.Sources, "fetch", lambda _: None)
    monkeypatch.setattr(command, "BUILD", tmp_path)
    monkeypatch.setattr(command, "run", lambda side, *_: {"tests/a.py::t": PASSED if side == "stock" else ours})
    monkeypatch.setattr(command, "RESULT", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["test_upstream.py", "tests/a.py"])
    assert command.main() == code
    assert not (tmp_path / "page.md").exists()  # some tests are not a result
