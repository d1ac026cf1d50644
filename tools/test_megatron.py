"""megatron-core's own unit tests, through this backend.

    python tools/test_megatron.py                            # all; writes docs/results/megatron.md
    python tools/test_megatron.py --keep 1,2                 # as above, with the last results on 1 and 2 ranks
    python tools/test_megatron.py tests/unit_tests/fusions   # some tests; prints only
    python tools/test_megatron.py --source CHECKOUT ...      # Megatron-LM's files from there; default: cloned

The tests are those of Megatron-LM at the tag of the installed version, by its commit; megatron.core is the installed
wheel. Upstream runs every test on eight ranks; tests/upstream/megatron_core.toml says on how many we run each file, and
why what does not pass does not. Exit code 1 when a failure fits no entry there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from upstream_lib.megatron import BUILD, SUITE, WORLDS, Runs, load_plan
from upstream_lib.megatron_report import as_markdown, show
from upstream_lib.outcomes import Suite
from upstream_lib.sources import MegatronSources

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "tests" / "upstream" / "megatron_core.toml"
RESULT = ROOT / "docs" / "results" / "megatron.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help=f"as pytest takes them; default: {SUITE}")
    parser.add_argument("--source", type=Path, help="a repository of Megatron-LM that has the tag's commit")
    parser.add_argument("--ranks", type=_numbers, default=WORLDS, help="only on these numbers of ranks, as 1,8")
    parser.add_argument("--keep", type=_numbers, default=(), help="do not run on these numbers of ranks again")
    args = parser.parse_args()
    plan = load_plan(PLAN)
    runs = Runs(sources := MegatronSources(BUILD, args.source), plan, BUILD / "some" if args.tests else BUILD)
    sources.fetch()
    plan.check(files := runs.test_files())
    for world in args.ranks:
        tests = args.tests or [f"{SUITE}/{file}" for file in plan.files(world, files)]
        if tests and world not in args.keep:
            runs.run(world, tests)
    found = Suite({world: runs.outcomes(world) for world in args.ranks}, plan.reasons)
    console = Console()
    show(found, Console(width=max(console.width, 150)))
    if not args.tests and args.ranks == WORLDS:
        RESULT.write_text(as_markdown(found, " ".join(["python tools/test_megatron.py", *sys.argv[1:]])))
    return 0 if found.good else 1


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
