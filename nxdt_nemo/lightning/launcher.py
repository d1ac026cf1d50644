"""Lightning's script launcher, able to start its children before trainer.fit.

Room lightning/. Subclass of lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher;
enters through Strategy._configure_launcher, no patch. Children are activated by NXDT_NEMO in their
environment. Proof: tests/nemo/test_launch.py.
"""

from __future__ import annotations

import atexit
import os
import subprocess
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

__all__ = ["EarlyScriptLauncher"]

SECONDS = 60.0


class EarlyScriptLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks once, whoever asks first: the model's construction or trainer.fit."""

    _observer: _ChildProcessObserver | None = None
    _succeeded = False

    def start(self) -> None:
        """Start ranks 1..n-1 of this host, unless they run already."""
        if self._observer is None:
            self._call_children_scripts()
            # As Lightning does: if a rank dies, this one does not wait for it.
            self._observer = _ChildProcessObserver(main_pid=os.getpid(), child_processes=self.procs)
            self._observer.start()
            atexit.register(self._leave)

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run `function` with all ranks started."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self.start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        self._succeeded = False
        result = function(*args, **kwargs)
        self._succeeded = True
        return result

    def _leave(self) -> None:
        """Ranks that ended well are given time to end; after an error they must not wait for this one."""
        assert self._observer is not None
        # It would answer the end of a child with a SIGKILL to this process, which has its own exit code.
        self._observer._child_processes = []
        for child in self.procs:
            if not self._succeeded:
                child.terminate()
            try:
                child.wait(SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
