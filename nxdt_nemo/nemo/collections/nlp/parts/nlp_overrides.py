"""NeMo's strategy on this backend.

Room nemo/. Subclasses of nemo.collections.nlp.parts.nlp_overrides.{NLPDDPStrategy, NLPDDPStrategyNotebook},
put in their place because scripts and MegatronTrainerBuilder construct them by name.
Proof: tests/nemo/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import _TunerExitException
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy as _NLPDDPStrategy
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategyNotebook as _NLPDDPStrategyNotebook
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from nemo.utils.model_utils import ckpt_to_dir

from nxdt_nemo.lightning.strategy import NeuronStrategyMixin

__all__ = ["NLPDDPStrategy", "NLPDDPStrategyNotebook"]


class NLPDDPStrategy(NeuronStrategyMixin, _NLPDDPStrategy):
    """NLPDDPStrategy whose ranks are up before the model, and whose checkpoints are complete or invisible."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """As upstream, under a temporary name until every rank has written its part.

        With async_save that goes on beside the training, and one save waits for the one before it: their writers
        report through one queue.
        """
        if not self.use_distributed_checkpointing:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        folder, save = Path(ckpt_to_dir(filepath)), super().save_checkpoint

        def write(partial: Path, options: Any) -> None:
            # ckpt_to_dir takes the suffix off again: the folder that is written is `partial` itself.
            save(checkpoint, partial.with_name(partial.name + ".ckpt"), options)

        if isinstance(self.checkpoint_io, AsyncFinalizableCheckpointIO):
            self._finish_saves()
            self.write_checkpoint(folder, lambda partial: write(partial, self._committing(folder, storage_options)))
        else:
            self.save_complete(folder, lambda partial: write(partial, storage_options))

    def _committing(self, folder: Path, options: Any) -> dict[str, Any]:
        """The storage options of an asynchronous save: NeMo's finalize_fn finds the checkpoint in its place."""
        finalize = (options or {}).get("finalize_fn")

        def finish() -> None:
            self.commit_checkpoint(folder)
            if finalize is not None:
                finalize()

        return {**(options or {}), "finalize_fn": finish}

    def _finish_saves(self) -> None:
        """Wait for the saves that are under way, on every rank, and commit them."""
        if isinstance(self.checkpoint_io, AsyncFinalizableCheckpointIO):
            self.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)

    def on_train_end(self) -> None:
        """NeMo waits for saves before its checkpoint callback starts the last one, so that it would be lost."""
        super().on_train_end()
        self._finish_saves()

    def teardown(self) -> None:
        """A run that ends at a time limit or a preemption has no end of training; its last save counts all the same.

        After any other exception ranks may be gone, and waiting for them would hang.
        """
        ending = sys.exception()
        if isinstance(ending, _TunerExitException) or (isinstance(ending, SystemExit) and not ending.code):
            self._finish_saves()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, load_optimizer_states: bool = True) -> dict[str, Any]:
        """As upstream; and the random states of this rank."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, load_optimizer_states)
        if self.use_distributed_checkpointing and load_optimizer_states:
            self.restore_rng(Path(ckpt_to_dir(checkpoint_path)))
        return checkpoint


class NLPDDPStrategyNotebook(NLPDDPStrategy, _NLPDDPStrategyNotebook):
    """One rank in a notebook: no launcher."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        self._launcher = None  # type: ignore[assignment]
