"""pytest plugin `-p nxdt_nemo.testing.upstream`: tests of NeMo and Megatron code run through this backend.

Room testing/. For NVIDIA's own tests (tools/test_upstream.py) and for yours. The backend has to be active before
anything imports NeMo or Megatron, and conftest.py files do: a plugin named with -p is loaded before them. The lane
is cpu unless NXDT_NEMO_RUNTIME says otherwise. Imports pytest and no torch. Proof: tests/testing/test_upstream.py.
"""

from __future__ import annotations

import os

import pytest

from nxdt_nemo import activate, deactivate, is_active
from nxdt_nemo.errors import NxdtError
from nxdt_nemo.runtime.select import VARIABLE

__all__ = ["pytest_load_initial_conftests", "pytest_report_header", "pytest_unconfigure"]


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Arm the backend. Raises pytest.UsageError, one line, if NeMo is there already or the lane is not."""
    if is_active():  # NXDT_NEMO=1 came first: whose it is, takes it out
        return
    try:
        activate(os.environ.get(VARIABLE, "cpu"))
    except NxdtError as error:
        raise pytest.UsageError(f"nxdt-nemo: {error}") from error
    early_config.add_cleanup(deactivate)


def pytest_report_header() -> str:
    """A line of pytest's header, so that a log says what it was."""
    from nxdt_nemo.runtime import current

    return f"nxdt_nemo: {current().name} lane"


def pytest_unconfigure() -> None:
    """Nothing of ours is left in a process that runs pytest as a function."""
