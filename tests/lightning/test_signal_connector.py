"""What is forked while a Trainer runs ends on SIGTERM; the Trainer's own process goes on noting it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest


def ended(active: bool) -> tuple[bool, bool]:
    """(a fork ended within a second of SIGTERM, this process still notes the signal)."""
    from lightning.pytorch.trainer.connectors import signal_connector

    from nxdt_nemo.lightning.signal_connector import let_forks_end

    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, signal_connector._HandlersCompose(lambda number, _: noted.append(number)))
    undo = let_forks_end(signal_connector, None)  # type: ignore[arg-type]
    if not active:
        undo()
    try:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, b"up")
            time.sleep(30)
            os._exit(0)
        os.read(read, 2)
        os.kill(child, signal.SIGTERM)
        time.sleep(0.5)
        gone = os.waitpid(child, os.WNOHANG)[0] == child
        if not gone:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        return gone, noted == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        let_forks_end(signal_connector, None)  # type: ignore[arg-type] - as the pool's ranks have it


@pytest.mark.ranks
def test_a_fork_ends_and_without_us_does_not(active: Callable[..., Any]) -> None:
    assert active(ended, True) == (True, True)
    assert active(ended, False) == (False, True)
