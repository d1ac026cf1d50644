"""A pool's worker that is forked while a Trainer runs ends when it is told to.

Room lightning/. Beside lightning.pytorch.trainer.connectors.signal_connector, whose handler of SIGTERM a fork inherits:
it notes the signal instead of ending, so that a multiprocessing.Pool waits for its worker for ever, and passes it on to
the other ranks. NeMo 2.0 indexes the data of fine-tuning in such a pool. Other forks keep the handler: one that writes
a checkpoint has to finish it when the job is told to end. Called when that module is imported, which is while Lightning
itself is half imported. Proof: tests/lightning/test_signal_connector.py.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType

from nxdt_nemo.patching.view import Views

__all__ = ["let_forks_end"]

_inherited: set[type] = set()  # of handlers that a pool's worker gives up


def let_forks_end(module: ModuleType, _: Views) -> Callable[[], None]:
    """Give pools' workers the system's answer to SIGTERM where Lightning's stands; returns what takes that back."""
    _watch_forks()
    _inherited.add(module._HandlersCompose)
    return _inherited.clear


@functools.cache
def _watch_forks() -> None:
    """Once a process: it cannot be undone."""
    os.register_at_fork(after_in_child=_in_fork)


def _in_fork() -> None:
    process = sys._getframe(1).f_locals.get("process_obj")  # of multiprocessing's Popen._launch, which has forked
    of_pool = "PoolWorker" in getattr(process, "name", "")
    if of_pool and isinstance(signal.getsignal(signal.SIGTERM), tuple(_inherited)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
