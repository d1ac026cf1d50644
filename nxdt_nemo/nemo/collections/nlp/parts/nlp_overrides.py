"""NeMo's strategy on this backend.

Room nemo/. Subclasses of nemo.collections.nlp.parts.nlp_overrides.{NLPDDPStrategy, NLPDDPStrategyNotebook},
put in their place because scripts and MegatronTrainerBuilder construct them by name.
Proof: tests/nemo/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy as _NLPDDPStrategy
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategyNotebook as _NLPDDPStrategyNotebook
from nemo.utils.model_utils import ckpt_to_dir

from nxdt_nemo.lightning.strategy import NeuronStrategyMixin

__all__ = ["NLPDDPStrategy", "NLPDDPStrategyNotebook"]


class NLPDDPStrategy(NeuronStrategyMixin, _NLPDDPStrategy):
    """NLPDDPStrategy whose ranks are up before the model, and whose checkpoints are complete or invisible."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """As upstream, under a temporary name until every rank has written its part."""
        if not self.use_distributed_checkpointing:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        save = super().save_checkpoint
        # ckpt_to_dir takes the suffix off again: the folder that is written is `partial` itself.
        self.save_complete(
            Path(ckpt_to_dir(filepath)),
            lambda partial: save(checkpoint, partial.with_name(partial.name + ".ckpt"), storage_options),
        )

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
