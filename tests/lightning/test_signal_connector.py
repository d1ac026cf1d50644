"""A pool's worker forked while a Trainer runs ends on SIGTERM; other forks, and the Trainer's process, only note it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

STAYS_S, ENDS_S = 0.5, 10.0  # how long one that notes the signal is watched, and one that ends at most


def ended(active: bool, name: str) -> tuple[bool, bool]:
    """(a fork of that name ended on SIGTERM, this process still notes the signal)."""
    from lightning.pytorch.trainer.connectors import signal_connector

    from nxdt_nemo.lightning.signal_connector import let_forks_end

    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, signal_connector._HandlersCompose(lambda number, _: noted.append(number)))
    undo = let_forks_end(signal_connector, None)  # type: ignore[arg-type]
    if not active:
        undo()
    fork = multiprocessing.get_context("fork")
    up = fork.Event()
    child = fork.Process(target=_sleep, args=(up,), name=name, daemon=True)
    try:
        child.start()
        up.wait()
        child.terminate()
        child.join(ENDS_S if active and "Pool" in name else STAYS_S)
        gone = not child.is_alive()
        child.kill()
        child.join()
        os.kill(os.getpid(), signal.SIGTERM)
        return gone, noted == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        let_forks_end(signal_connector, None)  # type: ignore[arg-type] - as the pool's ranks have it


def _sleep(up: Any) -> None:
    up.set()
    time.sleep(30)


def in_a_pool() -> str:
    """The name of a pool's worker."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_name)


def _name() -> str:
    return multiprocessing.current_process().name


WORKER, WRITER = "ForkPoolWorker-1", "ForkProcess-1"


@pytest.mark.ranks
def test_a_pools_worker_ends_and_without_us_does_not(active: Callable[..., Any]) -> None:
    assert active(ended, True, WORKER) == (True, True)
    assert active(ended, False, WORKER) == (False, True)
    assert active(ended, True, WRITER) == (False, True)
    assert active(in_a_pool).startswith("ForkPoolWorker-")
