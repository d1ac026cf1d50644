"""The self-test's report: a table, what this machine is, and the output of what failed.

Room testing/. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from nxdt_nemo import __version__
from nxdt_nemo.testing.selftest.stages import BUDGET, Outcome

__all__ = ["markdown"]


def markdown(outcomes: Sequence[Outcome], lane: str, machine: Sequence[str]) -> str:
    """The report.

    machine  lines of `nxdt-nemo doctor`, which hold no host or user name
    """
    return "\n".join(_lines(outcomes, lane, machine)) + "\n"


def _lines(outcomes: Sequence[Outcome], lane: str, machine: Sequence[str]) -> Iterator[str]:
    failed = [one for one in outcomes if not one.ok]
    seconds = f"{sum(one.seconds for one in outcomes):.0f} of {BUDGET:.0f} s"
    verdict = f"{len(failed)} of {len(outcomes)} stages failed" if failed else f"all {len(outcomes)} stages passed"
    yield f"# nxdt-nemo self-test: {verdict}"
    yield ""
    yield f"nxdt-nemo {__version__}, lane {lane}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {seconds}"
    yield ""
    yield "| stage | result | seconds | found |"
    yield "|---|---|---|---|"
    for one in outcomes:
        found = _homeless(" ".join(one.found.split())).replace("|", "\\|")
        yield f"| {one.stage} | {'passed' if one.ok else 'FAILED'} | {one.seconds:.0f} | {found} |"
    for one in failed:
        if one.output:
            yield from ("", f"## {one.stage}", "", "```", _homeless(one.output.strip()), "```")
    yield from ("", "## This machine", "", *machine)


def _homeless(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")
