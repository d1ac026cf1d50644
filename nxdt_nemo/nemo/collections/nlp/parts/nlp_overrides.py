"""NeMo's strategy on this backend.

Room nemo/. Subclasses of nemo.collections.nlp.parts.nlp_overrides.{NLPDDPStrategy, NLPDDPStrategyNotebook},
put in their place because scripts and MegatronTrainerBuilder construct them by name.
Proof: tests/nemo/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import _TunerExitException
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy as _NLPDDPStrategy
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategyNotebook as _NLPDDPStrategyNotebook
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from nemo.utils.model_utils import ckpt_to_dir
from torch.utils.data import DataLoader

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.lightning import loops
from nxdt_nemo.lightning.strategy import NeuronStrategyMixin
from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.data_samplers import EpochSampler, put_around
from nxdt_nemo.runtime.select import current

__all__ = ["NLPDDPStrategy", "NLPDDPStrategyNotebook"]


class NLPDDPStrategy(NeuronStrategyMixin, _NLPDDPStrategy):
    """NLPDDPStrategy whose ranks are up before the model, and whose checkpoints are complete or invisible.

    A run that goes on from one of them goes on with the data, too: setup_environment, setup and on_train_start, in
    Lightning's order.
    """

    _limit: int | float = 1.0
    _sampler: EpochSampler | None = None

    def setup_environment(self) -> None:
        """As upstream; and keep limit_train_batches, which NeMo soon writes over."""
        super().setup_environment()
        self._limit = self.lightning_module.trainer.limit_train_batches

    def setup(self, trainer: Any) -> None:
        """As upstream, with a training dataloader whose epoch is the whole one, whatever was done of it before."""
        module = self.lightning_module
        loader = getattr(module, "_train_dl", None)
        if trainer.state.fn == TrainerFn.FITTING and isinstance(loader, DataLoader):
            per_step = get_num_microbatches()
            limit = self._limit * per_step if isinstance(self._limit, int) else None
            self._sampler = put_around(loader, per_step, limit, int(getattr(module, "init_consumed_samples", 0)))
            if self._sampler is not None and limit is None:
                trainer.limit_train_batches = len(self._sampler)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """As Lightning; and chunks that NeMo keeps in a plain list, which torch does not see as parts of the model.

        They are made on the host with `use_cpu_initialization`, and only some of NeMo's paths move them.
        """
        super().model_to_device()
        chunks = getattr(self.model, "model", None)
        if isinstance(chunks, list):
            current().place(torch.nn.ModuleList(chunks))

    def on_train_start(self) -> None:
        """As upstream; and Lightning's counters agree with the sampler's place in the epoch."""
        super().on_train_start()
        module, sampler = self.lightning_module, self._sampler
        for config in module.trainer.lr_scheduler_configs:
            loops.rate_for_each_group(config.scheduler)
        if sampler is None:
            return
        fit_loop = module.trainer.fit_loop
        goes_on = bool(module.trainer.ckpt_path) and not getattr(module, "continue_training", False)
        if goes_on and "consumed_samples=" not in str(module.trainer.ckpt_path):
            module.init_consumed_samples = _consumed(module)
            sampler.seek(module.init_consumed_samples)
            iter(fit_loop._data_fetcher)
        if loops.finish_step(fit_loop) and not sampler.done:
            loops.finish_epoch(fit_loop)
        loops.set_fetched(fit_loop, sampler.done)

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


def _consumed(module: Any) -> int:
    """Samples that a run was trained on whose checkpoint's name does not say it; NeMo takes it for none."""
    if module.cfg.get("rampup_batch_size"):
        raise ConfigError(
            f"{module.trainer.ckpt_path} does not say how many samples were consumed",
            fix="have {consumed_samples} in exp_manager.checkpoint_callback_params.filename",
        )
    return int(module.trainer.global_step * module.cfg.global_batch_size)


class NLPDDPStrategyNotebook(NLPDDPStrategy, _NLPDDPStrategyNotebook):
    """One rank in a notebook: no launcher."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        self._launcher = None  # type: ignore[assignment]
