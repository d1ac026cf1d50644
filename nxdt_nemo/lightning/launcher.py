"""Lightning's script launcher, able to start its children before trainer.fit.

Room lightning/. Subclass of lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher;
enters through Strategy._configure_launcher, no patch. Children are activated by NXDT_NEMO in their
environment. Proof: tests/nemo/test_launch.py.
"""

from __future__ import annotations

import atexit

from lightning.fabric.strategies.launchers.subprocess_script import _launch_process_observer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

__all__ = ["EarlyScriptLauncher"]


class EarlyScriptLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks once, whoever asks first: the model's construction or trainer.fit."""

    _started = False

    def start(self) -> None:
        """Start ranks 1..n-1 of this host, unless they run already."""
        if not self._started:
            self._call_children_scripts()
            _launch_process_observer(self.procs)

    def _call_children_scripts(self) -> None:
        if not self._started:
            self._started = True
            super()._call_children_scripts()
            # An error before trainer.fit must not leave ranks behind that wait for this one.
            atexit.register(self._terminate)

    def _terminate(self) -> None:
        for child in self.procs:
            if child.poll() is None:
                child.terminate()
