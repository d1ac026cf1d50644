"""Megatron's parallel training as a strategy of Lightning's Trainer, for a MegatronLightningModule.

Room lightning/. Beside nemo.lightning.MegatronStrategy, which needs NeMo; on the mixin that NeMo's own strategy has
here, too. Enters as a Strategy instance, Lightning's own seam. Proof: tests/lightning/test_megatron_strategy.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_batch_on_this_cp_rank

from nxdt_nemo.errors import ConfigError, LayoutError
from nxdt_nemo.lightning import loops
from nxdt_nemo.lightning.megatron_module import Batch, MegatronLightningModule, MegatronOptimizer
from nxdt_nemo.lightning.rng import global_seed
from nxdt_nemo.lightning.samplers import skip
from nxdt_nemo.lightning.strategy import NeuronStrategyMixin

__all__ = ["NeuronMegatronStrategy"]

PLACE = "NeuronMegatronStrategy"


class NeuronMegatronStrategy(NeuronStrategyMixin, DDPStrategy):
    """Trainer(accelerator="neuron", devices=4, strategy=NeuronMegatronStrategy(tensor_model_parallel_size=2)).

    *_parallel_size      as in megatron-core; what they leave of the ranks is data parallel
    sequence_parallel    norms and dropout between tensor-parallel layers by parts of the sequence
    distributed_optimizer  its state in parts over the data-parallel ranks (ZeRO-1)
    micro_batch_size     samples that go through the model at once, fewer where a batch is not divided by it; None: the
                         dataloader's batch
    pipeline_dtype       of what pipeline stages send: has to be the model's params_dtype
    ddp                  further fields of megatron-core's DistributedDataParallelConfig
    A dataloader's batch is one step of one data-parallel rank. Weights are drawn with the seed of seed_everything, or
    1234. Ranks of one model draw alike from Python's and numpy's streams, for the order of data, and in workers; from
    torch's own stream pipeline stages do not, so that a data set without workers should leave it alone.
    Checkpoints are folders of megatron-core's torch_dist format, and go on in other layouts.
    Raises LayoutError, ConfigError.
    """

    def __init__(
        self,
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int | None = None,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        sequence_parallel: bool = False,
        distributed_optimizer: bool = False,
        micro_batch_size: int | None = None,
        pipeline_dtype: torch.dtype = torch.float32,
        ddp: Mapping[str, Any] | None = None,
        **lightning: Any,
    ) -> None:
        super().__init__(**lightning)
        self.sizes: dict[str, int] = {
            "tensor_model_parallel_size": tensor_model_parallel_size,
            "pipeline_model_parallel_size": pipeline_model_parallel_size,
            "context_parallel_size": context_parallel_size,
            "expert_model_parallel_size": expert_model_parallel_size,
        }
        self.virtual = virtual_pipeline_model_parallel_size
        self.sequence_parallel, self.distributed_optimizer = sequence_parallel, distributed_optimizer
        self.micro_batch_size, self.pipeline_dtype, self.ddp = micro_batch_size, pipeline_dtype, dict(ddp or {})
        self.wrapped: list[Any] = []
        optional = {"virtual_pipeline_model_parallel_size": self.virtual, "micro_batch_size": micro_batch_size}
        for name, size in (self.sizes | {name: size for name, size in optional.items() if size is not None}).items():
            if type(size) is not int or size < 1:
                raise ConfigError(f"{size!r} is no size", place=f"{PLACE}.{name}", fix="give a number from 1 on")
        self._refuse_pairs()

    def _refuse_pairs(self) -> None:
        for name, wanted, lacks in (
            ("sequence_parallel", "tensor_model_parallel_size", self.sequence_parallel),
            ("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_size", self.virtual is not None),
        ):
            if lacks and self.sizes[wanted] == 1:
                raise ConfigError(f"needs {wanted} above 1", place=f"{PLACE}.{name}", fix="raise it, or leave this out")

    @property
    def layout(self) -> dict[str, Any]:
        """Fields of a TransformerConfig."""
        return self.sizes | {
            "virtual_pipeline_model_parallel_size": self.virtual,
            "sequence_parallel": self.sequence_parallel,
            "pipeline_dtype": self.pipeline_dtype,
        }

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read other samples. Raises LayoutError if the sizes do not divide the ranks."""
        ranks: int = self.num_nodes * self.num_processes
        tensor, pipeline, context, experts = self.sizes.values()
        if ranks % (tensor * pipeline * context):
            text = f"{ranks} ranks are not divided by {tensor} x {pipeline} x {context}, tensor x pipeline x context"
            raise LayoutError(text, place="Trainer.devices", fix=f"use {tensor * pipeline * context}, or a multiple")
        beside = ranks // (tensor * pipeline)
        if beside % experts:
            text = f"{experts} does not divide the {beside} ranks that tensor and pipeline leave"
            raise LayoutError(text, place=f"{PLACE}.expert_model_parallel_size", fix="use one of their divisors")
        return beside // context

    # --- bring-up ------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Ranks, then Megatron's groups and random streams: before the model is built."""
        self._check_trainer()
        self.data_parallel_size  # noqa: B018 - raises
        super().setup_environment()

    def _check_trainer(self) -> None:
        module, trainer = self.lightning_module, self.lightning_module.trainer
        if not isinstance(module, MegatronLightningModule):
            fix = "derive from it, or leave the strategy out"
            raise ConfigError(f"{type(module).__name__} is no MegatronLightningModule", place=PLACE, fix=fix)
        for name, right, fix in (
            ("precision", "32-true", "say it in the TransformerConfig: bf16=True, params_dtype=torch.bfloat16"),
            ("gradient_clip_val", None, "use OptimizerConfig(clip_grad=...)"),
            ("accumulate_grad_batches", 1, f"use a larger batch and {PLACE}(micro_batch_size=...)"),
        ):
            if (given := getattr(trainer, name)) != right:
                raise ConfigError(f"{given!r} has no effect here", place=f"Trainer.{name}", fix=fix)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        tensor, pipeline, context, experts = self.sizes.values()
        if self._groups_of_another_layout():
            parallel_state.destroy_model_parallel()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor, pipeline, self.virtual, context_parallel_size=context, expert_model_parallel_size=experts
            )
        data = global_seed() + parallel_state.get_data_parallel_rank()
        random.seed(data)
        np.random.seed(data % 2**32)
        # By stage, as upstream: weights and dropout of the hidden states are drawn from it.
        seed = global_seed() + 100 * parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)

    def _groups_of_another_layout(self) -> bool:
        """True where a Trainer before this one has left groups of other sizes."""
        return parallel_state.model_parallel_is_initialized() and [*self.sizes.values(), self.virtual] != [
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        ]

    def pieces(self) -> Iterator[tuple[int | None, tuple[bool, bool]]]:
        """This rank's: (vp_stage, (it begins the model, it ends it))."""
        for stage in range(self.virtual) if self.virtual else (None,):
            named = {"ignore_virtual": False, "vp_stage": stage}
            first = parallel_state.is_pipeline_first_stage(**named)
            yield stage, (first, parallel_state.is_pipeline_last_stage(**named))

    def check(self, config: Any) -> None:
        """Raise ConfigError for a model that was built for another layout, or cannot be trained in it."""
        for name, size in self.layout.items():
            if getattr(config, name) != size:
                fix = "build it with **self.layout"
                raise ConfigError(f"{getattr(config, name)}, and the strategy has {size}", place=name, fix=fix)
        if self.sizes["pipeline_model_parallel_size"] > 1 and config.params_dtype != self.pipeline_dtype:
            text = f"{self.pipeline_dtype}, and the model's params_dtype is {config.params_dtype}"
            raise ConfigError(text, place=f"{PLACE}.pipeline_dtype", fix="give the same to both")
        if config.fp16:
            raise ConfigError("True, and no loss is scaled here", place="fp16", fix="use bf16=True instead")
        if config.params_dtype != torch.float32 and not config.bf16:
            fix = "add bf16=True" if config.params_dtype == torch.bfloat16 else "leave it out"
            raise ConfigError(f"{config.params_dtype} without bf16=True", place="params_dtype", fix=fix)
        if config.calculate_per_token_loss:
            text = "True, and micro-batches count alike here, whatever their tokens"
            raise ConfigError(text, place="calculate_per_token_loss", fix="leave it out")

    def setup(self, trainer: Any) -> None:
        """Wrap the model's pieces, and give them an optimizer if they are trained."""
        assert self.accelerator is not None
        self._refuse_outsiders()
        self.accelerator.setup(trainer)
        self.model_to_device()
        module: Any = self.lightning_module
        self.wrapped = [Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk for chunk in module.chunks]
        if trainer.state.fn == TrainerFn.FITTING:
            ddp = DistributedDataParallelConfig(
                **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": self.distributed_optimizer} | self.ddp
            )
            config = module.chunks[0].config
            self.wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in self.wrapped]
            waits = [chunk.no_sync for chunk in self.wrapped] if ddp.overlap_grad_reduce else [None]
            config.no_sync_func = waits if len(waits) > 1 else waits[0]
            config.finalize_model_grads_func = finalize_model_grads
            self.setup_optimizers(trainer)
            config.grad_scale_func = self._optimizer.inner.scale_loss

    def teardown(self) -> None:
        """As upstream; and the model is without what setup put around it, so that another Trainer may wrap it."""
        for chunk in self.wrapped:
            _unwrap(chunk)
        self.wrapped = []
        super().teardown()

    def _refuse_outsiders(self) -> None:
        """Nothing would train, or save, a tensor of the module that is in none of its pieces."""
        for name in self.lightning_module.state_dict():
            if not name.startswith("chunks."):
                raise ConfigError(
                    "is in no piece of the model", place=name, fix="make it a part of what chunk() returns"
                )

    @property
    def _optimizer(self) -> MegatronOptimizer:
        optimizer = self.optimizers[0] if len(self.optimizers) == 1 else None
        if not isinstance(optimizer, MegatronOptimizer):
            fix = "return self.megatron_optimizer(OptimizerConfig(...))"
            raise ConfigError("not one optimizer of megatron-core's", place="configure_optimizers", fix=fix)
        return optimizer

    # --- data ----------------------------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of one model read the same samples."""
        return {"num_replicas": self.data_parallel_size, "rank": parallel_state.get_data_parallel_rank()}

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """A rank's batch in equal parts of at most micro_batch_size samples, each with this rank's share of positions.

        Equal, since micro-batches count alike: the mean of their losses is the batch's, in its last, smaller one too.
        """
        if not (isinstance(batch, dict) and batch and all(isinstance(part, torch.Tensor) for part in batch.values())):
            fix = "have the data set, or collate_fn, make one"
            raise ConfigError(f"a batch is no dict of tensors: {type(batch).__name__}", place="dataloader", fix=fix)
        rows = len(next(iter(batch.values())))
        size = math.gcd(rows, self.micro_batch_size or rows)
        parts = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
        return [get_batch_on_this_cp_rank(dict(zip(batch, part, strict=True))) for part in parts]

    def on_train_start(self) -> None:
        """As upstream; and a run that was stopped goes on with the next batch of its epoch."""
        super().on_train_start()
        fit_loop = self.lightning_module.trainer.fit_loop
        steps = loops.finish_step(fit_loop)
        if steps and steps % fit_loop.max_batches == 0:
            loops.finish_epoch(fit_loop)
            steps = 0
        if steps:
            loader = fit_loop._combined_loader.flattened[0]
            _set_sampler_epoch(loader, fit_loop.epoch_progress.current.processed)
            skip(loader, steps)
            iter(fit_loop._data_fetcher)
            loops.set_fetched(fit_loop, steps)

    # --- checkpoints ---------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Into tensors that are there."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: no rank has all of it."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: no rank has all of it."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: load_checkpoint has done it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: load_checkpoint has done it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """A folder that is complete or not there; `checkpoint`, Lightning's own, is in its common.pt."""
        state = self._sharded(is_loading=False) | {"lightning": checkpoint}
        self.save_complete(Path(filepath), lambda partial: dist_checkpointing.save(state, str(partial)))

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """Weights, the optimizer's state and this rank's random states; returns Lightning's own."""
        folder = Path(checkpoint_path)
        self.recover(folder)
        if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
            raise ConfigError("no checkpoint of megatron-core's is there", place=str(folder))
        state = dist_checkpointing.load(self._sharded(is_loading=True), str(folder))
        module: Any = self.lightning_module
        for name, chunk in self._named(module):
            chunk.load_state_dict(state[name])
        if "optimizer" in state:
            self._optimizer.inner.load_state_dict(state["optimizer"])
        self.restore_rng(folder)
        return state["lightning"]  # type: ignore[no-any-return]

    def _sharded(self, is_loading: bool) -> dict[str, Any]:
        state = {name: chunk.sharded_state_dict() for name, chunk in self._named(self.lightning_module)}
        if self.optimizers:
            state["optimizer"] = self._optimizer.inner.sharded_state_dict(dict(state), is_loading)
        return state

    @staticmethod
    def _named(module: Any) -> list[tuple[str, Any]]:
        return [(f"model{number}", chunk) for number, chunk in enumerate(module.chunks)]


def _unwrap(chunk: Any) -> None:
    """Take megatron-core's hooks off a piece's parameters and layers, and its buffers off its configuration."""
    if not isinstance(chunk, DistributedDataParallel):
        return
    chunk.grad_accs.clear()  # the only owner of the nodes that have the hooks
    if chunk.remove_forward_pre_hook_handles:
        chunk.disable_forward_pre_hook(param_sync=False)
    config = chunk.config
    config.no_sync_func = config.finalize_model_grads_func = config.grad_scale_func = None
