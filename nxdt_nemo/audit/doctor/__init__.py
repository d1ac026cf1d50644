"""What `nxdt-nemo doctor` finds: versions, lanes, traps, and what is missing for a run.

Room audit/. Imports neither torch nor anything of upstream into this process; what must be imported to be known runs
in processes with a time limit (probes.py). Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import dataclasses
import os
from itertools import chain
from pathlib import Path

from nxdt_nemo.audit.doctor import backend, host, lanes, probes, traps, variables, versions
from nxdt_nemo.audit.doctor.row import Row, State

__all__ = ["Row", "State", "examine"]


def examine(version: str, *, with_probes: bool = True) -> list[Row]:
    """All rows, in the order of the report. The user's home folder is written `~`.

    version      this package's own
    with_probes  also import torch, NeMo and torch_xla, in processes of their own: 10 to 30 s
    """
    parts = chain(
        backend.rows(version),
        host.rows(),
        lanes.rows(),
        versions.rows(),
        probes.rows() if with_probes else (),
        traps.rows(),
        variables.rows(os.environ),
    )
    return [dataclasses.replace(row, found=_homeless(row.found), fix=_homeless(row.fix)) for row in parts]


def _homeless(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")
