"""megatron-core's own unit tests, through this backend.

    python tools/test_megatron.py                            # what has not run yet; writes docs/results/megatron.md
    python tools/test_megatron.py --fresh                    # all
    python tools/test_megatron.py --ranks 1,8                # as the first, on these numbers of ranks only
    python tools/test_megatron.py tests/unit_tests/fusions   # some tests again; their outcomes replace the last ones
    python tools/test_megatron.py --source CHECKOUT ...      # Megatron-LM's files from there; default: cloned

The tests are those of Megatron-LM at the tag of the installed version, by its commit; megatron.core is the installed
wheel. Upstream runs every test on eight ranks; tests/upstream/megatron_core.toml says on how many we run each file, and
why what does not pass does not. A run may be cut short at any time: what each test came to is in build/megatron, and
the next run goes on from there. Exit code 1 when a failure fits no entry, or a file has not run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from upstream_lib.megatron import BUILD, SUITE, WORLDS, Plan, Runs, load_plan
from upstream_lib.megatron_report import Result, as_markdown, show
from upstream_lib.outcomes import Suite
from upstream_lib.sources import MegatronSources

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "tests" / "upstream" / "megatron_core.toml"
RESULT = ROOT / "docs" / "results" / "megatron.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help=f"as pytest takes them, by files; default: {SUITE}")
    parser.add_argument("--source", type=Path, help="a repository of Megatron-LM that has the tag's commit")
    parser.add_argument(
        "--ranks", type=_numbers, default=WORLDS, help="only on these numbers of ranks, as 1,8; none: 0"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what the tests came to on these numbers of ranks")
    args = parser.parse_args()
    plan = load_plan(PLAN)
    runs = Runs(sources := MegatronSources(BUILD, args.source), plan, BUILD)
    sources.fetch()
    for world in args.ranks:
        if args.fresh:
            runs.forget(world)
        tests = _named(args.tests, plan, world, runs) if args.tests else _paths(_fitting(plan, runs.missing(world)))
        if tests:
            runs.run(world, tests)
    logs = {world: runs.log(world) for world in WORLDS}
    missing = {world: runs.missing(world) for world in WORLDS}
    when = sorted(moment for log in logs.values() for moment in log.when)
    suite = Suite({world: log.outcomes for world, log in logs.items()}, plan.reasons)
    found = Result(suite, missing, when, plan.wants)
    console = Console()
    show(found, Console(width=max(console.width, 150)))
    RESULT.write_text(as_markdown(found))
    return 0 if found.suite.good and not any(missing.values()) else 1


def _named(tests: list[str], plan: Plan, world: int, runs: Runs) -> list[str]:
    """Those of the tests, or of the tests in these folders, that run on so many ranks."""
    here = _paths(plan.files(world, runs.test_files()))
    chosen = [test for test in tests if test.partition("::")[0] in here]
    folders = tuple(f"{test.rstrip('/')}/" for test in tests)
    return chosen + [file for file in here if file.startswith(folders)]


def _fitting(plan: Plan, files: list[str]) -> list[str]:
    """Those for which there is memory enough; who names a file gets it whatever it wants."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) / 1e6
    return [file for file in files if plan.wants(file) <= free]


def _paths(files: list[str]) -> list[str]:
    return [f"{SUITE}/{file}" for file in files]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word != "0")


if __name__ == "__main__":
    sys.exit(main())
