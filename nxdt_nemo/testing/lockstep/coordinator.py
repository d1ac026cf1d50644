"""Who runs what, how long, and what came of it.

Room testing/. For nxdt_nemo.testing.lockstep; knows nothing of torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from _pytest.reports import TestReport

__all__ = ["Coordinator", "Limits", "merged"]

Test = tuple[str, tuple[str, int | None, str]]  # node id and location, as pytest has them
Reports = list[dict[str, Any]]  # of one test on one rank, as pytest serializes them


@dataclass(frozen=True)
class Limits:
    """Seconds: one test on all ranks; the others, once one rank has failed, since they may wait for it."""

    test_s: float = 300.0
    grace_s: float = 5.0


@dataclass
class _Answers:
    """What the ranks said of one test, in the order in which they did; `hung` did not say anything."""

    reports: dict[int, Reports]
    hung: list[int]

    @property
    def good(self) -> bool:
        return not self.hung and not any(map(_failed, self.reports.values()))


class Coordinator:
    """Tells the ranks behind `pipes` what to run. `stacks` are the files where a hanging rank says where it is."""

    def __init__(self, pipes: Sequence[Connection], stacks: Sequence[Path], limits: Limits) -> None:
        self._pipes, self._stacks, self._limits = pipes, stacks, limits
        self._children: dict[int, int] = {}  # rank -> process id of the child that runs tests now

    def serve(self) -> None:
        """Run all tests. Raises RuntimeError when the ranks collected different tests."""
        found = [_received(pipe) for pipe in self._pipes]
        if None in found:
            return  # pytest has said why
        if any(tests != found[0] for tests in found):
            raise RuntimeError("the ranks collected different tests: is there a set, or a random number, in a name?")
        for first, stop in _files(found[0]):
            start = first
            while start < stop:
                start = self._run(found[0], start, stop, resumed=start > first)
        for pipe in self._pipes:
            pipe.send(("end",))

    def _run(self, tests: Sequence[Test], start: int, stop: int, *, resumed: bool) -> int:
        """Run tests from `start` on new ranks, as far as they go; returns the first that has not run."""
        port, results, index = _free_port(), [], start
        for pipe in self._pipes:
            pipe.send(("run", start, stop, port, resumed))
        for index in range(start, stop):
            if index > start:
                for pipe in self._pipes:
                    pipe.send(("next",))
            answers = self._gather(tests[index])
            results.append((tests[index], merged(tests[index], answers.reports, len(self._pipes))))
            if not answers.good:
                break
        self._end(kill=index + 1 < stop or not answers.good)
        for test, reports in results:
            self._pipes[0].send(("log", test, reports))
        return index + 1

    def _gather(self, test: Test) -> _Answers:
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        answers = _Answers({}, [])
        deadline = time.monotonic() + self._limits.test_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            pipe: Any
            for pipe in ready:
                rank = waiting[pipe]
                kind, value = pipe.recv()
                if kind == "started":
                    self._children[rank] = value
                    continue
                del waiting[pipe]
                if kind == "ended":
                    del self._children[rank]
                    value = [_failure(test, f"rank {rank}: its process ended with code {value}")]
                    answers.reports = {rank: value, **answers.reports}  # first: the others' errors come from that
                answers.reports[rank] = value
                if _failed(value):
                    deadline = min(deadline, time.monotonic() + self._limits.grace_s)
            if not ready:
                answers.hung = sorted(waiting.values())
                if not any(map(_failed, answers.reports.values())):
                    rank = answers.hung[0]
                    answers.reports[rank] = [_failure(test, self._where(answers.hung))]
                break
        return answers

    def _where(self, hung: Sequence[int]) -> str:
        """The stacks of ranks that hang."""
        for rank in hung:
            os.kill(self._children[rank], signal.SIGUSR1)
        time.sleep(0.5)
        stacks = "".join(f"--- rank {rank}\n{self._stacks[rank].read_text()}" for rank in hung)
        return f"ranks {', '.join(map(str, hung))} hang after {self._limits.test_s:.0f} s\n{stacks}"

    def _end(self, *, kill: bool) -> None:
        """Wait until no rank has a child left."""
        for rank, pipe in enumerate(self._pipes):
            if kill and rank in self._children:
                with contextlib.suppress(ProcessLookupError):  # ended by itself meanwhile
                    os.kill(self._children[rank], signal.SIGKILL)
            while rank in self._children:
                kind, _ = pipe.recv()
                if kind == "ended":
                    del self._children[rank]


def merged(test: Test, reports: Mapping[int, Reports], world: int) -> Reports:
    """One rank's reports for all: the first that failed; else one that passed; else one that skipped."""
    failed = next((rank for rank, found in reports.items() if _failed(found)), None)
    if failed is not None:
        return [_named(report, failed, world) for report in reports[failed]]
    return min(sorted(reports.items()), key=lambda pair: any(report["outcome"] == "skipped" for report in pair[1]))[1]


def _named(report: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    text = report["longrepr"]
    if report["outcome"] == "failed" and world > 1 and isinstance(text, dict):
        text["sections"] = [*text.get("sections", ()), (f"rank {rank} of {world}, the first to fail", "", "-")]
    return report


def _failed(reports: Reports) -> bool:
    return any(report["outcome"] == "failed" for report in reports)


def _failure(test: Test, text: str) -> dict[str, Any]:
    nodeid, location = test
    report = TestReport(nodeid, location, {}, "failed", text, "call")
    return {**report._to_json(), "$report_type": "TestReport"}


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


def _files(tests: Sequence[Test]) -> list[tuple[int, int]]:
    """(start, stop) of each run of tests of one file."""
    files = [nodeid.partition("::")[0] for nodeid, _ in tests]
    starts = [index for index, file in enumerate(files) if index == 0 or file != files[index - 1]]
    return list(zip(starts, [*starts[1:], len(files)], strict=True)) if starts else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
