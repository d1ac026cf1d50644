"""What every strategy of this backend does on top of Lightning's DDPStrategy.

Room lightning/: knows Lightning, not NeMo. A mixin that stands before the framework's strategy class, so
that it enters as a Strategy instance, Lightning's own seam. Proof: tests/nemo/test_resume.py.
"""

from __future__ import annotations

import os
import shutil
import weakref
from pathlib import Path
from typing import Any

from nxdt_nemo.lightning.launcher import EarlyScriptLauncher
from nxdt_nemo.lightning.rng import RngSnapshot
from nxdt_nemo.runtime import current

__all__ = ["NeuronStrategyMixin", "newest_strategy"]

_newest: weakref.ref[NeuronStrategyMixin] | None = None


def newest_strategy() -> NeuronStrategyMixin | None:
    """The strategy that the script's Trainer was built with last, if it is alive."""
    return _newest() if _newest is not None else None


class NeuronStrategyMixin:
    """Ranks before the model, complete checkpoints, random states that survive a restart.

    Order of calls: _configure_launcher (Trainer's construction), bring_up_ranks (the model's construction;
    each rank), then Lightning's own hooks.
    """

    def _configure_launcher(self) -> None:
        global _newest
        _newest = weakref.ref(self)
        environment = self.cluster_environment  # type: ignore[attr-defined]
        if environment is not None and not environment.creates_processes_externally:
            self._launcher = EarlyScriptLauncher(environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]

    def bring_up_ranks(self) -> None:
        """Start the ranks and join the process group: layers take their groups when they are built."""
        launcher = getattr(self, "_launcher", None)
        if isinstance(launcher, EarlyScriptLauncher):
            launcher.start()
        self.setup_distributed()  # type: ignore[attr-defined]

    def _get_process_group_backend(self) -> str:
        return current().backend

    # --- random states -------------------------------------------------------------------------------

    _rng: RngSnapshot | None = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's optimizer step; then note where this rank's random streams stand."""
        result = super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        self._rng = RngSnapshot.take()
        current().step_boundary()
        return result

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Go on where the last step ended: validation and saving between two steps leave no trace.

        So a step draws the same numbers whether or not the run was stopped before it.
        """
        if self._rng is not None:
            self._rng.restore()
        super().on_train_batch_start(*args, **kwargs)  # type: ignore[misc]

    # --- checkpoints ---------------------------------------------------------------------------------

    def save_complete(self, folder: Path, write: Any) -> None:
        """Let every rank write a checkpoint folder under a temporary name, then rename it into place.

        folder   where the finished checkpoint stands, on a file system that all ranks share
        write    called on each rank with the temporary folder
        A kill before the rename leaves only the temporary folder, which resuming does not look at.
        """
        partial = folder.with_name(folder.name + ".incomplete")
        if self.is_global_zero:  # type: ignore[attr-defined]
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.barrier("checkpoint folder")  # type: ignore[attr-defined]
        write(partial)
        (self._rng or RngSnapshot.take()).save(partial, self.global_rank, self.world_size)  # type: ignore[attr-defined]
        self.barrier("checkpoint written")  # type: ignore[attr-defined]
        if self.is_global_zero:  # type: ignore[attr-defined]
            _commit(partial, folder)
        self.barrier("checkpoint committed")  # type: ignore[attr-defined]

    def restore_rng(self, folder: Path) -> None:
        """Take this rank's random states from a checkpoint that was saved with as many ranks."""
        self._rng = RngSnapshot.load(folder, self.global_rank, self.world_size)  # type: ignore[attr-defined]


def _commit(partial: Path, folder: Path) -> None:
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _sync(path)
    if folder.exists():
        replaced = folder.with_name(folder.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


