"""The pytest plugin of one rank: collects, then forks at the coordinator's word and runs tests in the child.

Room testing/. For nxdt_nemo.testing.lockstep. The child shares the parent's pipe and writes to it alone; the parent
writes when the child is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from _pytest.runner import runtestprotocol

from nxdt_nemo.runtime import current

__all__ = ["Worker", "end_with_parent", "offer_memory"]

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """The kernel kills this process when its parent is gone; a fork has to ask again."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def offer_memory() -> None:
    """When memory runs out, the kernel ends this process before any other; its test fails, the next gets new ranks."""
    Path("/proc/self/oom_score_adj").write_text("1000")


class Worker:
    """Serves the coordinator at the other end of `pipe`. `stack` is where a hanging rank says where it is."""

    def __init__(self, pipe: Connection, stack: Path) -> None:
        self._pipe, self._stack = pipe, stack
        self._reports: list[Any] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Say what was collected; run, log and end as told."""
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            raise session.Interrupted("errors during collection")
        self._pipe.send([(item.nodeid, item.location) for item in session.items])
        gc.freeze()  # so that collecting garbage in a child copies no page of this process
        while True:
            order, *what = self._pipe.recv()
            if order == "run":
                self._fork(session, *what)
            elif order == "log":
                self._log(session.config, *what)
            elif order == "end":
                return True  # else a "next" that a child was ended before reading

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run one test; nobody but the coordinator hears of it yet."""
        self._reports = runtestprotocol(item, log=False, nextitem=nextitem)
        return True

    def _fork(self, session: pytest.Session, *order: Any) -> None:
        child = os.fork()
        if child == 0:
            try:
                self._run(session, *order)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        self._pipe.send(("ended", os.waitstatus_to_exitcode(status)))

    def _run(self, session: pytest.Session, start: int, stop: int, port: int, resumed: bool) -> None:
        end_with_parent()
        offer_memory()
        os.environ["MASTER_PORT"] = str(port)
        with self._stack.open("w") as stack:
            faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
            self._pipe.send(("started", os.getpid()))
            if resumed:
                dist.init_process_group(current().backend)  # as a test before this one may have, which others rely on
            for index in range(start, stop):
                if index > start:
                    self._pipe.recv()
                item, following = session.items[index], session.items[index + 1] if index + 1 < stop else None
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                serialized = session.config.hook.pytest_report_to_serializable
                reports = [serialized(config=session.config, report=report) for report in self._reports]
                self._pipe.send(("reports", reports))

    def _log(self, config: pytest.Config, test: tuple[str, Any], reports: list[dict[str, Any]]) -> None:
        nodeid, location = test
        config.hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
        for data in reports:
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            config.hook.pytest_runtest_logreport(report=report)
        config.hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
