"""NVIDIA's own tests, without this backend and with it.

    python tools/test_upstream.py                     # both sides, 12 minutes; writes docs/results/upstream.md
    python tools/test_upstream.py --keep-stock        # ours only, beside the last stock run; writes too
    python tools/test_upstream.py tests/lightning/_io # some tests; prints only

The tests come from the sdist of nemo_toolkit on the package registry, by a pinned hash. Each side is one pytest
process on the CPU; ours has `-p nxdt_nemo.testing.upstream`, and that is all the difference. Exit code 1 when a test
that passed on stock does not pass through us, or when a failure fits no entry of tools/upstream_lib/reasons.toml.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from upstream_lib.outcomes import Comparison, load_reasons, read_junit
from upstream_lib.report import as_markdown, show
from upstream_lib.runs import SUITES, result, run
from upstream_lib.sources import BUILD, Sources

RESULT = Path(__file__).parents[1] / "docs" / "results" / "upstream.md"
REASONS = Path(__file__).parent / "upstream_lib" / "reasons.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help=f"as pytest takes them; default: {' '.join(SUITES)}")
    parser.add_argument("--keep-stock", action="store_true", help="do not run the stock side again")
    args = parser.parse_args()
    reasons, stock = load_reasons(REASONS), result("stock")
    if args.keep_stock and (args.tests or not stock.exists()):
        parser.error("--keep-stock needs a whole stock run from before, and no tests named")
    sources = Sources()
    sources.fetch()
    tests, folder = args.tests or SUITES, BUILD / "some" if args.tests else BUILD
    folder.mkdir(parents=True, exist_ok=True)
    before = read_junit(stock) if args.keep_stock else run("stock", sources, tests, folder / stock.name)
    found = Comparison(before, run("ours", sources, tests, folder / result("ours").name), reasons)
    console = Console()
    show(found, Console(width=max(console.width, 150)))
    if not args.tests:
        day = datetime.fromtimestamp(stock.stat().st_mtime, UTC)
        RESULT.write_text(as_markdown(found, " ".join(["python tools/test_upstream.py", *sys.argv[1:]]), day))
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
