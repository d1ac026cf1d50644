"""What each test came to, a line of JSON each, written as soon as it is known: a run that is cut short keeps the rest.

Room testing/. For nxdt_nemo.testing.lockstep. Three kinds of lines, told apart by their keys:
  {"file", "tests"}                              so many tests of this file are about to run
  {"test", "status", "seconds", "when", "text"}  status passed | failed | error | skipped; text says why
  {"file", "error", "when"}                      this file could not be imported
Proof: tests/testing/test_lockstep.py.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Record"]


class Record:
    """pytest plugin of the rank that logs; appends to `path`."""

    LONGEST = 20_000  # characters of a text, its end

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reports: list[pytest.TestReport] = []
        self._files: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported; and which can."""
        if report.failed:
            self._write(file=report.nodeid, error=report.longreprtext[-self.LONGEST :], when=_now())
        elif report.nodeid.endswith(".py"):
            self._files.append(report.nodeid)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many tests of each file, 0 where all were deselected."""
        counts = Counter(item.nodeid.partition("::")[0] for item in session.items)
        for file in dict.fromkeys((*self._files, *counts)):
            self._write(file=file, tests=counts[file])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test."""
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """All phases of a test."""
        phases, self._reports = self._reports, []
        worst = max(phases, key=lambda report: ("passed", "skipped", "failed").index(report.outcome))
        status = "error" if worst.failed and worst.when != "call" else str(worst.outcome)
        text = worst.longrepr[2] if isinstance(worst.longrepr, tuple) else worst.longreprtext
        seconds = round(sum(report.duration for report in phases), 1)
        self._write(test=nodeid, status=status, seconds=seconds, when=_now(), text=text[-self.LONGEST :])

    def _write(self, **line: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
