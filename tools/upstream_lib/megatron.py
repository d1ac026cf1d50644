"""Megatron-LM's unit tests: where each runs, and the runs, by nxdt_nemo.testing.lockstep."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from upstream_lib.outcomes import Outcome, Reason, as_reasons, read_junit
from upstream_lib.sources import MegatronSources

__all__ = ["BUILD", "SUITE", "WORLDS", "Plan", "Runs", "load_plan"]

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "megatron"
SUITE = "tests/unit_tests"
WORLDS = (1, 2, 4, 8)
# The first three: no cache, no word of what is left out, upstream's own options (-x among them) not taken.
OPTIONS = ("-p", "no:cacheprovider", "--no-header", "-o", "addopts=", "-q", "-W", "ignore", "--tb=short")
OPTIONS += ("--continue-on-collection-errors", "-o", "consider_namespace_packages=true")
VIEWS = ("tests", "tools")
# Imported once and not once a rank.
PRELOAD = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.multimodal.llava_model",
    "megatron.training.checkpointing",
    "megatron.training.training",
    "transformers",
)
MARK = "pytest.mark.experimental"


@dataclass(frozen=True)
class Plan:
    """tests/upstream/megatron_core.toml: how many ranks each file wants, and why what does not pass does not.

    ranks    (number of ranks, patterns of files below SUITE); a file may stand in several, the first match of each
    nominal  test modules that may import transformer_engine and find nothing
    """

    ranks: tuple[tuple[int, tuple[str, ...]], ...]
    nominal: tuple[str, ...]
    reasons: tuple[Reason, ...]

    def files(self, world: int, files: Iterable[str]) -> list[str]:
        """Those of `files`, paths below SUITE, that run on so many ranks."""
        patterns = [pattern for number, found in self.ranks if number == world for pattern in found]
        return [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]

    def check(self, files: Iterable[str]) -> None:
        """Raises SystemExit for files that run on no number of ranks."""
        planned = {file for world in WORLDS for file in self.files(world, files)}
        lost = sorted(set(files) - planned)
        if lost:
            raise SystemExit(f"test-megatron: say in megatron_core.toml on how many ranks to run {', '.join(lost)}")


def load_plan(path: Path) -> Plan:
    """Raises ValueError for an unknown kind of reason or number of ranks."""
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    ranks = tuple((int(world), tuple(patterns)) for world, patterns in table["ranks"].items())
    if unknown := [world for world, _ in ranks if world not in WORLDS]:
        raise ValueError(f"{path.name}: ranks {unknown[0]} is not one of {', '.join(map(str, WORLDS))}")
    return Plan(ranks, tuple(table["nominal"]), tuple(as_reasons(table["reason"], path.name)))


class Runs:
    """Runs tests on so many ranks and keeps what they came to as BUILD/world8.xml and its like.

    Upstream runs tests that it marks experimental apart, with its experimental flag on: world8-experimental.xml.
    """

    def __init__(self, sources: MegatronSources, plan: Plan, out: Path) -> None:
        self._sources, self._plan, self._out = sources, plan, out

    def test_files(self) -> list[str]:
        """All of upstream's, as paths below SUITE."""
        suite = self._sources.folder / SUITE
        found = (str(path.relative_to(suite)) for path in suite.rglob("test_*.py"))
        return sorted(file for file in found if file != "test_utilities.py")

    def run(self, world: int, tests: Sequence[str]) -> None:
        """`tests` as pytest takes them. Raises SystemExit when pytest ends without a result."""
        for path in self._paths(world):
            path.unlink(missing_ok=True)
        plain, experimental = self._paths(world)
        self._run(world, plain, (*tests, "-m", "not experimental"))
        marked = [test for test in tests if self._is_marked(test)]
        if marked:
            self._run(world, experimental, (*marked, "-m", "experimental", "--experimental"))

    def outcomes(self, world: int) -> dict[str, Outcome]:
        """What the last run came to; {} if there was none."""
        found: dict[str, Outcome] = {}
        for path in self._paths(world):
            if path.exists():
                found |= read_junit(path)
        return found

    def _paths(self, world: int) -> tuple[Path, Path]:
        return self._out / f"world{world}.xml", self._out / f"world{world}-experimental.xml"

    def _is_marked(self, test: str) -> bool:
        path = self._sources.folder / test.partition("::")[0]
        files = path.rglob("test_*.py") if path.is_dir() else [path]
        return any(MARK in file.read_text(encoding="utf-8") for file in files)

    def _run(self, world: int, xml: Path, words: Sequence[str]) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        log, started, temp = xml.with_suffix(".log"), time.monotonic(), self._out / "temp"
        shutil.rmtree(temp, ignore_errors=True)
        command = [sys.executable, "-m", "nxdt_nemo.testing.lockstep", f"--ranks={world}", f"--junitxml={xml}"]
        command += [f"--basetemp={temp}", f"--logs={xml.with_suffix('')}"]
        command += [f"--preload={module}" for module in PRELOAD] + ["--", *OPTIONS]
        command += [f"--nxdt-view={package}" for package in VIEWS]
        command += [f"--nxdt-nominal={module}" for module in self._plan.nominal]
        print(f"{world} ranks: follow it in {log}", flush=True)
        with log.open("w", encoding="utf-8") as out:
            where = {"cwd": self._sources.folder, "env": self._environment(), "stdout": out, "stderr": out}
            code = subprocess.run([*command, *words], **where, check=False).returncode
        shutil.rmtree(temp, ignore_errors=True)
        print(f"{world} ranks: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        if not xml.exists():
            raise SystemExit(f"test-megatron: pytest ended with exit code {code} and no result; see {log}")

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NXDT_")}
        kept.pop("PYTHONDONTWRITEBYTECODE", None)  # or each rank compiles each test module again
        path = (str(ROOT), str(self._sources.packages), str(self._sources.folder))
        return kept | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
