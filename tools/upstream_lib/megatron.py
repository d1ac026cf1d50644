"""Megatron-LM's unit tests: where each runs, the runs, by nxdt_nemo.testing.lockstep, and what they came to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from upstream_lib.outcomes import Outcome, Reason, as_reasons
from upstream_lib.sources import MegatronSources

__all__ = ["BUILD", "SUITE", "WORLDS", "Log", "Plan", "Runs", "load_plan"]

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "megatron"
SUITE = "tests/unit_tests"
WORLDS = (1, 2, 4, 8)
# The first three: no cache, no word of what is left out, upstream's own options (-x among them) not taken.
OPTIONS = ("-p", "no:cacheprovider", "--no-header", "-o", "addopts=", "-q", "-W", "ignore", "--tb=short")
OPTIONS += ("--continue-on-collection-errors", "-o", "consider_namespace_packages=true")
VIEWS = ("tests", "tools", "nvidia_resiliency_ext")
# Imported once and not once a rank.
PRELOAD = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.multimodal.llava_model",
    "megatron.training.checkpointing",
    "megatron.training.training",
    "transformers",
)
NO_MEMORY = "its process ended with code -9"  # the kernel ended it: no outcome
MARK = "pytest.mark.experimental"
TEST_S, WAIT_S = 400, 150  # seconds for one test on all ranks, and for a collective; for a busy machine


@dataclass(frozen=True)
class Plan:
    """tests/upstream/megatron_core.toml: how many ranks each file wants, and why what does not pass does not.

    ranks    (number of ranks, patterns of files below SUITE); a file may stand in several; on 1 run those in none
    te       test modules that may import transformer_engine, and learn that there is no FP8
    memory   gigabytes of memory without which a file is not run, by pattern
    """

    ranks: tuple[tuple[int, tuple[str, ...]], ...]
    te: tuple[str, ...]
    reasons: tuple[Reason, ...]
    memory: Mapping[str, int] = field(default_factory=dict)

    def files(self, world: int, files: Iterable[str]) -> list[str]:
        """Those of `files`, paths below SUITE, that run on so many ranks."""
        return [file for file in files if world in self._worlds(file)]

    def wants(self, file: str) -> int:
        """Gigabytes that must be free for this file, of all its ranks."""
        return max((size for pattern, size in self.memory.items() if fnmatch(file, pattern)), default=0)

    def _worlds(self, file: str) -> set[int]:
        return {world for world, found in self.ranks if any(fnmatch(file, pattern) for pattern in found)} or {1}


def load_plan(path: Path) -> Plan:
    """Raises ValueError for an unknown kind of reason or number of ranks."""
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    ranks = tuple((int(world), tuple(patterns)) for world, patterns in table["ranks"].items())
    if unknown := [world for world, _ in ranks if world not in WORLDS]:
        raise ValueError(f"{path.name}: ranks {unknown[0]} is not one of {', '.join(map(str, WORLDS))}")
    return Plan(ranks, tuple(table["te"]), tuple(as_reasons(table["reason"], path.name)), table["memory"])


@dataclass
class Log:
    """What a record of nxdt_nemo.testing.lockstep says: each test's last outcome; a file counts as run when all its
    tests have one.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    when: set[str] = field(default_factory=set)
    tests: dict[str, int] = field(default_factory=dict)  # by file

    @classmethod
    def read(cls, path: Path) -> Log:
        """Empty if there is none."""
        log = cls()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            log._add(json.loads(line))
        return log

    def ran(self, file: str) -> bool:
        """Whether this file (its path below SUITE) need not run again."""
        name = f"{SUITE}/{file}"
        known = sum(test.partition("::")[0] == name for test in self.outcomes)
        return name in self.outcomes or (name in self.tests and known >= self.tests[name])

    def _add(self, line: dict[str, Any]) -> None:
        self.when |= {line["when"]} if "when" in line else set()
        if "test" in line and NO_MEMORY not in line["text"]:
            self.outcomes[line["test"]] = Outcome(line["status"], line["text"])
        elif "error" in line:
            self.outcomes[line["file"]] = Outcome("error", line["error"])
        elif "file" in line:
            self.outcomes.pop(line["file"], None)  # it can be imported now
            self.tests[line["file"]] = max(line["tests"], self.tests.get(line["file"], 0))


class Runs:
    """Runs tests on so many ranks; what they came to is kept in BUILD/world8.jsonl and its like.

    Upstream runs tests that it marks experimental apart, with its experimental flag on: world8-experimental.jsonl.
    """

    def __init__(self, sources: MegatronSources, plan: Plan, out: Path) -> None:
        self._sources, self._plan, self._out = sources, plan, out

    def test_files(self) -> list[str]:
        """All of upstream's, as paths below SUITE."""
        suite = self._sources.folder / SUITE
        found = (str(path.relative_to(suite)) for path in suite.rglob("test_*.py"))
        return sorted(file for file in found if file != "test_utilities.py")

    def missing(self, world: int) -> list[str]:
        """Files of the plan that have not run on so many ranks, or not to their end."""
        files, logs = self._plan.files(world, self.test_files()), self._logs(world)
        marked = {file for file in files if self._is_marked(f"{SUITE}/{file}")}
        return [file for file in files if not logs[0].ran(file) or (file in marked and not logs[1].ran(file))]

    def forget(self, world: int) -> None:
        """What the tests came to on so many ranks."""
        for path in self._paths(world):
            path.unlink(missing_ok=True)

    def run(self, world: int, tests: Sequence[str]) -> None:
        """`tests` as pytest takes them. Raises SystemExit when pytest does not get to them."""
        plain, experimental = self._paths(world)
        self._run(world, plain, (*tests, "-m", "not experimental"))
        marked = [test for test in tests if self._is_marked(test)]
        if marked:
            self._run(world, experimental, (*marked, "-m", "experimental", "--experimental"))

    def log(self, world: int) -> Log:
        """What the tests of the plan came to, so far."""
        plain, experimental = self._logs(world)
        files = {f"{SUITE}/{file}" for file in self._plan.files(world, self.test_files())}
        both = {**plain.outcomes, **experimental.outcomes}
        found = {test: outcome for test, outcome in both.items() if test.partition("::")[0] in files}
        return Log(found, plain.when | experimental.when)

    def _logs(self, world: int) -> tuple[Log, Log]:
        plain, experimental = self._paths(world)
        return Log.read(plain), Log.read(experimental)

    def _paths(self, world: int) -> tuple[Path, Path]:
        return self._out / f"world{world}.jsonl", self._out / f"world{world}-experimental.jsonl"

    def _is_marked(self, test: str) -> bool:
        path = self._sources.folder / test.partition("::")[0]
        files = path.rglob("test_*.py") if path.is_dir() else [path]
        return any(MARK in file.read_text(encoding="utf-8") for file in files)

    def _run(self, world: int, record: Path, words: Sequence[str]) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        log, started, temp = record.with_suffix(".log"), time.monotonic(), self._out / "temp"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        command = [sys.executable, "-m", "nxdt_nemo.testing.lockstep", f"--ranks={world}", f"--record={record}"]
        command += [
            f"--basetemp={temp}",
            f"--logs={record.with_suffix('')}",
            f"--test-timeout={TEST_S}",
            f"--wait-timeout={WAIT_S}",
        ]
        command += [f"--preload={module}" for module in PRELOAD] + ["--", *OPTIONS]
        command += [f"--nxdt-view={package}" for package in VIEWS]
        command += [f"--nxdt-te={module}" for module in self._plan.te]
        print(f"{world} ranks: follow it in {log}", flush=True)
        with log.open("w", encoding="utf-8") as out:
            where = {"cwd": self._sources.folder, "env": self._environment(), "stdout": out, "stderr": out}
            code = subprocess.run([*command, *words], **where, check=False).returncode
        shutil.rmtree(temp, ignore_errors=True)
        print(f"{world} ranks: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        if code not in (0, 1, 5):  # pytest's: all passed, some failed, none found
            raise SystemExit(f"test-megatron: pytest ended with exit code {code}; see {log}")

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NXDT_")}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)  # or each rank compiles each test module again
        path = (str(ROOT), str(self._sources.packages), str(self._sources.folder))
        return kept | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
