"""What has to be imported to know whether it works: each in a process of its own, with a time limit.

Room audit/. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from nxdt_nemo.audit.doctor.row import Row
from nxdt_nemo.runtime.machine import installed

__all__ = ["SECONDS", "Probe", "rows", "run"]

SECTION = "imports"
SECONDS = 120.0
GPT = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"


@dataclass(frozen=True)
class Probe:
    """A line of Python that must end with exit code 0 in an environment with `variables` set."""

    what: str
    code: str
    fix: str
    variables: dict[str, str] = field(default_factory=dict)


def rows() -> Iterator[Row]:
    """The rows of this section; all probes run at once."""
    found = list(_wanted())
    with ThreadPoolExecutor(len(found)) as pool:
        yield from pool.map(run, found)


def _wanted() -> Iterator[Probe]:
    armed = "import nxdt_nemo; assert nxdt_nemo.is_active(), 'the backend is not active'"
    yield Probe("NXDT_NEMO=1 python", armed, "install nxdt-nemo again", {"NXDT_NEMO": "1"})
    if installed("torch"):
        yield Probe("torch", "import torch", "install the tested version")
    if installed("nemo"):
        code = f"import nxdt_nemo; nxdt_nemo.activate(); import {GPT}"
        yield Probe("NeMo's GPT on the cpu lane", code, "see the rows that are no `ok`; else file this report")
    if installed("torch_xla"):
        yield Probe("torch_xla", "import torch_xla", "torch and torch-xla must match; the cpu lane needs neither")


def run(probe: Probe, seconds: float = SECONDS) -> Row:
    """The row of one probe."""
    environment = {name: value for name, value in os.environ.items() if name != "NXDT_NEMO"}
    environment |= {"NXDT_NEMO_RUNTIME": "cpu", "HF_HUB_OFFLINE": "1"} | probe.variables
    started = time.monotonic()
    try:
        # -P: like the command nxdt-nemo, and unlike python -c, keep the current folder off sys.path.
        done = subprocess.run(
            [sys.executable, "-P", "-c", probe.code],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Row(SECTION, probe.what, f"not done after {seconds:.0f} s", "problem", probe.fix)
    if done.returncode == 0:
        return Row(SECTION, probe.what, f"works, {time.monotonic() - started:.1f} s")
    last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return Row(SECTION, probe.what, last, "problem", probe.fix)
