"""NVIDIA's tests in one pytest process: the stock side, or ours with the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from upstream_lib.outcomes import Outcome, Side, read_junit
from upstream_lib.sources import BUILD, Sources

__all__ = ["PLUGIN", "SUITES", "result", "run"]

SUITES = ("tests/lightning", "tests/core", "tests/utils", "tests/collections/llm")
PLUGIN = "nxdt_nemo.testing.upstream"
# Theirs: one device less to look for, and no download of recordings. Ours: nothing is kept between runs.
OPTIONS = ("--cpu", "--use_local_test_data", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-q")


def result(side: Side) -> Path:
    """Where a side's last run stands, as pytest wrote it."""
    return BUILD / f"{side}.xml"


def run(side: Side, sources: Sources, tests: Sequence[str], xml: Path) -> dict[str, Outcome]:
    """Run `tests`, write `xml` and a log beside it. Raises SystemExit when pytest ends without a result."""
    folder = BUILD / side
    sources.unpack(folder)
    xml.unlink(missing_ok=True)
    plugin = ("-p", PLUGIN) if side == "ours" else ()
    command = (sys.executable, "-m", "pytest", *plugin, *OPTIONS, f"--junitxml={xml}", *tests)
    log, started = xml.with_suffix(".log"), time.monotonic()
    print(f"{side}: {' '.join(tests)}; follow it in {log}", flush=True)
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(
            command, cwd=folder, env=_environment(sources, folder), stdout=out, stderr=subprocess.STDOUT, check=False
        ).returncode
    print(f"{side}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    if not xml.exists():
        raise SystemExit(f"test-upstream: {side}: pytest ended with exit code {code} and no result; see {log}")
    return read_junit(xml)


def _environment(sources: Sources, folder: Path) -> dict[str, str]:
    """The same for both sides. The backend enters by the plugin only; no hub is asked, which would take minutes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NXDT_")}
    kept |= {"PYTHONPATH": str(sources.packages), "NEMO_HOME": str(folder / "home")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
