"""Starting python, and `nxdt-nemo`, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(*arguments, **environment) runs python with these arguments in tmp_path."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NXDT_NEMO", "HYDRA_FULL_ERROR")
    }

    def run(
        *arguments: str, cwd: Path = tmp_path, timeout: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**inherited, "NXDT_NEMO_RUNTIME": "cpu", **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def ours(start: Start) -> Start:
    """ours(*arguments, **environment) runs `nxdt-nemo` with these arguments in tmp_path."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return start("-m", "nxdt_nemo", *arguments, **options)

    return run
