"""What a run of NVIDIA's tests came to, and the reasons that we give for what does not pass."""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

__all__ = [
    "KINDS",
    "Comparison",
    "Kind",
    "Outcome",
    "Outcomes",
    "Reason",
    "Side",
    "Suite",
    "as_reasons",
    "load_reasons",
    "read_junit",
]

Side = Literal["stock", "ours"]
Status = Literal["passed", "failed", "error", "skipped"]
Kind = Literal["not applicable", "upstream", "by design", "open", "removed"]
KINDS: dict[str, str] = {
    "not applicable": "needs what is not there by design: a CUDA device, the network, another product's packages",
    "upstream": "fails whatever runs it: upstream's own mistake, or a dependency of another version",
    "by design": "we do otherwise, and say why",
    "open": "ours to do",
    "removed": "fails on stock; through us it passes, or counts as unexplained",
}
_RANK: dict[Status, int] = {"passed": 0, "skipped": 1, "failed": 2, "error": 3}


@dataclass(frozen=True)
class Outcome:
    """One test of one run; text holds the traceback, or why it was skipped."""

    status: Status
    text: str = ""

    @property
    def bad(self) -> bool:
        """Neither passed nor skipped."""
        return self.status in ("failed", "error")


@dataclass(frozen=True)
class Reason:
    """An entry of reasons.toml. It holds for a test only if both the test's id and what it says match."""

    cause: str
    kind: Kind
    why: str
    tests: str  # a regular expression, searched in the test's id
    says: str  # a regular expression, searched in the failure's text

    def explains(self, test: str, outcome: Outcome) -> bool:
        return bool(re.search(self.tests, test) and re.search(self.says, outcome.text))


Outcomes = Mapping[str, Outcome]  # by test id
Explained = Mapping[Reason, list[str]]


def load_reasons(path: Path) -> list[Reason]:
    """See as_reasons."""
    return as_reasons(tomllib.loads(path.read_text(encoding="utf-8"))["reason"], path.name)


def as_reasons(entries: Iterable[Mapping[str, str]], name: str) -> list[Reason]:
    """Raises ValueError for an entry with an unknown kind, TypeError for one with other fields."""
    reasons = [Reason(**entry) for entry in entries]  # type: ignore[arg-type]
    for reason in reasons:
        if reason.kind not in get_args(Kind):
            raise ValueError(f"{name}: {reason.cause!r}: kind {reason.kind!r} is not one of {', '.join(KINDS)}")
    return reasons


def read_junit(path: Path) -> dict[str, Outcome]:
    """Test id -> outcome, from a file of `pytest --junitxml`; of several for one test the worst."""
    found: dict[str, Outcome] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        test, outcome = _id(case), _outcome(case)
        if test not in found or _RANK[outcome.status] > _RANK[found[test].status]:
            found[test] = outcome
    return found


def _id(case: ET.Element) -> str:
    """`tests/core/test_x.py::TestY::test_z[1]`; a module that could not be imported is its path."""
    names = case.get("classname", "").split(".") if case.get("classname") else []
    last = case.get("name", "")
    if not names:
        return f"{last.replace('.', '/')}.py"
    module = [name for name in names if not name.startswith("Test")]
    return "::".join([f"{'/'.join(module)}.py", *names[len(module) :], last])


def _outcome(case: ET.Element) -> Outcome:
    for child in case:
        status: Status | None = {"failure": "failed", "error": "error", "skipped": "skipped"}.get(child.tag)  # type: ignore[assignment]
        if status is not None:
            return Outcome(status, f"{child.get('message') or ''}\n{child.text or ''}")
    return Outcome("passed")


def _explain(outcomes: Outcomes, reasons: Iterable[Reason]) -> dict[Reason, list[str]]:
    """Failures and errors, by the first reason that fits, in the reasons' order."""
    groups: dict[Reason, list[str]] = {reason: [] for reason in reasons}
    for test, outcome in outcomes.items():
        if outcome.bad:
            fits = next((reason for reason in groups if reason.explains(test, outcome)), None)
            if fits is not None:
                groups[fits].append(test)
    return groups


def _unexplained(outcomes: Outcomes, explained: Explained) -> list[str]:
    known = {test for tests in explained.values() for test in tests}
    return sorted(test for test, outcome in outcomes.items() if outcome.bad and test not in known)


def _count(outcomes: Outcomes, explained: Explained, below: str) -> Counter[str]:
    """How many tests passed, failed, did not run (error) and are not applicable, of those whose id starts so.

    Not applicable: skipped by the test's own mark or question, or failed for a reason of that kind; a test that
    counts there counts nowhere else, so that the columns add up.
    """
    excused = {test for reason, tests in explained.items() if reason.kind == "not applicable" for test in tests}
    found: Counter[str] = Counter()
    for test, outcome in outcomes.items():
        if test.startswith(below):
            apart = outcome.status == "skipped" or test in excused
            found["not applicable" if apart else outcome.status] += 1
    return found


def _skips(outcomes: Outcomes) -> Counter[str]:
    """Why tests were skipped, in their own words."""
    return Counter(outcome.text.strip().splitlines()[0] for outcome in outcomes.values() if outcome.status == "skipped")


@dataclass
class Suite:
    """One suite through us, on several numbers of ranks, and the reasons. `good` is the verdict."""

    worlds: Mapping[int, Outcomes]
    reasons: Iterable[Reason] = field(default_factory=list)

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """A test that ran on several numbers of ranks failed if it did on one, and passed if it did on one."""
        order: dict[Status, int] = {"skipped": 0, "passed": 1, "failed": 2, "error": 3}
        found: dict[str, Outcome] = {}
        for outcomes in self.worlds.values():
            for test, outcome in outcomes.items():
                if test not in found or order[outcome.status] > order[found[test].status]:
                    found[test] = outcome
        return found

    @cached_property
    def explained(self) -> dict[Reason, list[str]]:
        """The failures and errors, by the first reason that fits."""
        return _explain(self.outcomes, self.reasons)

    @cached_property
    def unexplained(self) -> list[str]:
        """Failures and errors that no reason fits."""
        return _unexplained(self.outcomes, self.explained)

    @property
    def good(self) -> bool:
        """Whether everything that does not pass says why not."""
        return bool(self.outcomes) and not self.unexplained

    def counts(self, below: str = "", world: int | None = None) -> Counter[str]:
        """As of all tests whose id starts so, or of those that ran on so many ranks."""
        return _count(self.outcomes if world is None else self.worlds[world], self.explained, below)

    def skips(self) -> Counter[str]:
        """Why tests were skipped, in their own words."""
        return _skips(self.outcomes)


@dataclass
class Comparison:
    """Both sides and the reasons. `good` is the verdict."""

    stock: Outcomes
    ours: Outcomes
    reasons: Iterable[Reason] = field(default_factory=list)

    @cached_property
    def lost(self) -> list[str]:
        """What passed on stock and does not through us; a reason does not excuse it."""
        passed = (test for test, outcome in self.stock.items() if outcome.status == "passed")
        return sorted(test for test in passed if test not in self.ours or self.ours[test].status != "passed")

    @cached_property
    def explained(self) -> dict[Reason, list[str]]:
        """The failures and errors through us, by the first reason that fits, in the reasons' order."""
        return _explain(self.ours, [reason for reason in self.reasons if reason.kind != "removed"])

    @cached_property
    def explained_on_stock(self) -> dict[Reason, list[str]]:
        """As explained, of the stock side."""
        return _explain(self.stock, self.reasons)

    @cached_property
    def unexplained(self) -> list[str]:
        """Failures and errors through us that no reason fits."""
        return _unexplained(self.ours, self.explained)

    @property
    def good(self) -> bool:
        """Whether everything that passed on stock passes, and everything else says why not."""
        return bool(self.ours) and not self.lost and not self.unexplained

    def counts(self, side: Side, below: str = "") -> Counter[str]:
        """See _count."""
        if side == "stock":
            return _count(self.stock, self.explained_on_stock, below)
        return _count(self.ours, self.explained, below)

    def statuses(self, side: Side) -> Counter[str]:
        """As pytest counts."""
        return Counter(outcome.status for outcome in (self.stock if side == "stock" else self.ours).values())

    def skips(self) -> Counter[str]:
        """Why tests were skipped through us, in their own words."""
        return _skips(self.ours)
