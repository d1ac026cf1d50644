"""What every strategy of this backend does on top of Lightning's DDPStrategy.

Room lightning/: knows Lightning, not NeMo. A mixin that stands before the framework's strategy class, so
that it enters as a Strategy instance, Lightning's own seam. Proof: tests/nemo/test_resume.py.
"""

from __future__ import annotations

import glob
import shutil
import weakref
from pathlib import Path
from typing import Any

from nxdt_nemo import folders
from nxdt_nemo.lightning.graphs import GraphsMixin
from nxdt_nemo.lightning.launcher import EarlyScriptLauncher
from nxdt_nemo.lightning.rng import RngSnapshot, global_seed
from nxdt_nemo.lightning.samplers import give_streams
from nxdt_nemo.runtime import current

__all__ = ["NeuronStrategyMixin", "newest_strategy"]

# Beside a folder: not a checkpoint. NeMo's callback uses the same sign; without it, it would rank a folder that was
# cut short among the best ones, delete a complete one in exchange, and never clear it away.
UNFINISHED = "-unfinished"

_newest: weakref.ref[NeuronStrategyMixin] | None = None


def newest_strategy() -> NeuronStrategyMixin | None:
    """The strategy that the script's Trainer was built with last, if it is alive."""
    return _newest() if _newest is not None else None


class NeuronStrategyMixin(GraphsMixin):
    """Ranks before the model, complete checkpoints, random states that survive a restart.

    Order of calls: _configure_launcher (Trainer's construction), start_ranks and bring_up_ranks (the model's
    construction; each rank), then Lightning's own hooks.
    """

    def _configure_launcher(self) -> None:
        global _newest
        _newest = weakref.ref(self)
        environment = self.cluster_environment
        if environment is not None and not environment.creates_processes_externally:
            self._launcher = EarlyScriptLauncher(environment, self.num_processes, self.num_nodes)

    def start_ranks(self, rank: int, world: int) -> None:
        """Start this host's other ranks, and let the lane know which one this is: NeMo seeds the device before they
        have joined."""
        launcher = getattr(self, "_launcher", None)
        if isinstance(launcher, EarlyScriptLauncher):
            launcher.start()
        current().ranks_are_coming(rank, world)

    def bring_up_ranks(self) -> None:
        """Join the process group: layers take their groups when they are built."""
        self.setup_distributed()
        current().ranks_are_up()

    def model_to_device(self) -> None:
        """As Lightning, keeping what upstream noted on the parameters."""
        current().place(self.model)

    # --- random states -------------------------------------------------------------------------------

    # What begins an epoch draws from a stream of the dataloader's own (process_dataloader). So a run that was stopped
    # draws what it would have drawn, whatever is done again when it goes on.

    _before: RngSnapshot | None = None  # a validation that is going on
    _loaded: RngSnapshot | None = None

    def process_dataloader(self, dataloader: object) -> object:
        """As Lightning; what it draws is the same on ranks of one model, and in an epoch that is begun again."""
        loader: object = super().process_dataloader(dataloader)
        rank = self.distributed_sampler_kwargs["rank"]
        give_streams(loader, global_seed(), rank)
        return loader

    def on_train_start(self) -> None:
        """Let loggers go on counting where the optimizer stands.

        A checkpoint that was saved in a validation holds Lightning's logging step from before it, one short,
        so that a resumed curve would be drawn one step to the left.
        """
        super().on_train_start()
        trainer = self.lightning_module.trainer
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if self._loaded is not None:
            self._loaded.restore()
        self._before = self._loaded = None

    def on_validation_start(self) -> None:
        """As Lightning; and note where this rank's random streams stand."""
        self._before = RngSnapshot.take()
        super().on_validation_start()

    def on_validation_end(self) -> None:
        """As Lightning; and what the validation drew leaves no trace."""
        super().on_validation_end()
        if self._before is not None:
            self._before.restore()
        self._before = None

    # --- checkpoints ---------------------------------------------------------------------------------

    def save_complete(self, folder: Path, write: Any) -> None:
        """Let every rank write a checkpoint folder under a temporary name, then rename it into place.

        folder   where the finished checkpoint stands, on a file system that all ranks share
        write    called on each rank with the temporary folder
        A kill before the rename leaves only the temporary folder, which resuming does not look at, and the
        mark beside it.
        """
        self.write_checkpoint(folder, write)
        self.commit_checkpoint(folder)

    def write_checkpoint(self, folder: Path, write: Any) -> None:
        """The first half of save_complete, on each rank; what `write` leaves to other processes may go on after it."""
        partial, mark = _partial(folder)
        current().settle()
        if self.is_global_zero:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folders.recover(folder.parent.glob(f"*{folders.REPLACED}"))
            mark.touch()
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
        self.barrier("checkpoint folder")
        before = self._before or RngSnapshot.take()
        with current().reading():
            write(partial)
        before.save(partial, self.global_rank, self.world_size)
        before.restore()

    def commit_checkpoint(self, folder: Path) -> None:
        """The second half, on each rank when it has written all of its part."""
        partial, mark = _partial(folder)
        self.barrier("checkpoint written")
        if self.is_global_zero:
            # NeMo's own mark goes first: under its name a folder is whole, and after a kill must not look otherwise.
            _mark(folder).unlink(missing_ok=True)
            _commit(partial, folder)
            mark.unlink()
        self.barrier("checkpoint committed")

    def recover(self, folder: Path) -> None:
        """Give a checkpoint its name back before it is read, if a kill while it was replaced left it without."""
        if self.is_global_zero:
            folders.recover(folder.parent.glob(f"{glob.escape(folder.name)}{folders.REPLACED}"))
        self.barrier("checkpoint recovered")

    def restore_rng(self, folder: Path) -> None:
        """Let training begin with this rank's random states of a checkpoint that was saved with as many ranks."""
        self._loaded = RngSnapshot.load(folder, self.global_rank, self.world_size)


def _partial(folder: Path) -> tuple[Path, Path]:
    """A checkpoint's temporary folder, and the mark beside it."""
    partial = folder.with_name(folder.name + ".incomplete")
    return partial, _mark(partial)


def _mark(folder: Path) -> Path:
    return folder.with_name(folder.name + UNFINISHED)


def _commit(partial: Path, folder: Path) -> None:
    """Make `partial` stand as `folder`, once all of it is on the disk."""
    for path in (*sorted(partial.rglob("*")), partial):
        folders.sync(path)
    folders.commit(partial, folder)
