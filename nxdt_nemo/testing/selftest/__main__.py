"""`python -m nxdt_nemo.testing.selftest [--output FILE]`: what `nxdt-nemo doctor --on-device` starts.

Room testing/. Exit code 1 when a stage failed. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from nxdt_nemo import __version__
from nxdt_nemo.errors import UserError
from nxdt_nemo.runtime.select import select
from nxdt_nemo.testing.selftest.report import markdown
from nxdt_nemo.testing.selftest.stages import STAGES, run


def main() -> int:
    """Run the stages, a line each as it ends, and write the report."""
    from nxdt_nemo.audit.doctor import examine
    from nxdt_nemo.cli.doctor import report
    from nxdt_nemo.cli.run import leave

    parser = argparse.ArgumentParser(prog="nxdt-nemo doctor --on-device")
    parser.add_argument("--output", type=Path, default=Path("nxdt-nemo-selftest.md"))
    parser.add_argument("--only", choices=list(STAGES), action="append")
    given = parser.parse_args()
    try:
        lane, reason = select()
    except UserError as error:
        leave(error)
    print(f"lane {lane.name} ({reason})", flush=True)
    wanted = {name: stage for name, stage in STAGES.items() if given.only is None or name in given.only}
    try:
        given.output.open("a", encoding="utf-8").close()
    except OSError as error:
        leave(UserError(f"cannot be written: {error.strerror}", place=f"-o {given.output}"))
    machine = list(report(examine(__version__, with_probes=False)))
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="nxdt-selftest-") as folder:
        for outcome in run(Path(folder), lane.name, wanted):
            outcomes.append(outcome)
            state = "passed" if outcome.ok else "FAILED"
            print(f"{state}  {outcome.stage:16}{outcome.seconds:5.0f} s  {outcome.found}", flush=True)
            # After each stage: a machine that hangs in the next one leaves a report too.
            given.output.write_text(markdown(outcomes, lane.name, machine), encoding="utf-8")
    print(f"report: {given.output}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
