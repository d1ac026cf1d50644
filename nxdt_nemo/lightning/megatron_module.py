"""A LightningModule whose layers are megatron-core's, trained in whatever layout its strategy has.

Room lightning/. Beside nemo.lightning.MegatronParallel, which needs NeMo. Enters as the user's base class, no patch.
Proof: tests/lightning/test_megatron_strategy.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

if TYPE_CHECKING:
    from nxdt_nemo.lightning.megatron_strategy import NeuronMegatronStrategy

__all__ = ["MegatronLightningModule", "MegatronOptimizer"]

Batch = dict[str, Tensor]


class MegatronOptimizer(torch.optim.Optimizer):
    """megatron-core's optimizer as Lightning and torch's schedulers hold one.

    inner      of get_megatron_optimizer
    chunks     the wrapped model, whose gradient buffers zero_grad() clears
    grad_norm  of the last step, before clipping; None before the first
    """

    def __init__(self, inner: Any, chunks: list[Any]) -> None:
        self.inner, self.chunks = inner, chunks
        self.defaults: dict[str, Any] = {}
        self.grad_norm: Any = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups  # type: ignore[no-any-return]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and the buffers that they are added up in."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Lightning's closure computes the gradients; then the parameters are updated."""
        loss = closure() if closure is not None else None
        _, self.grad_norm, _ = self.inner.step()
        return loss


class MegatronLightningModule(LightningModule):
    """To be trained by NeuronMegatronStrategy, in as many pieces as that has.

    Yours: chunk, forward_step, configure_optimizers, dataloaders; loss, if the output is not the loss of each token.
    Order of calls: chunk for each piece (each rank, when the ranks are up), configure_optimizers, then a step:
    training_step, and in it forward_step and loss for each micro-batch, by megatron-core's schedule for the layout.

    A batch is a dict of tensors that begin with [B, S], B the samples of one data-parallel rank, S positions;
    forward_step gets a micro-batch of it, of S / cp positions with context parallelism.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList()

    def chunk(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
        """A pipeline stage's piece of the model: of megatron-core, with a TransformerConfig(**self.layout) as config.

        pre_process   it begins the model: has the embedding
        post_process  it ends it: has the output layer
        vp_stage      its number on this rank where a rank has several, else None
        """
        raise NotImplementedError

    def forward_step(self, chunk: torch.nn.Module, batch: Batch) -> Tensor:
        """What a piece makes of a micro-batch: of the last one this goes to `loss`, of others to the next stage."""
        raise NotImplementedError

    def loss(self, batch: Batch, output: Tensor) -> Tensor:
        """The loss of a micro-batch, shape []. Micro-batches, and ranks that share a sequence, count alike."""
        return output.float().mean()

    @property
    def layout(self) -> dict[str, Any]:
        """The strategy's sizes as fields of a TransformerConfig."""
        return self._strategy.layout

    def megatron_optimizer(self, config: OptimizerConfig, **named: Any) -> MegatronOptimizer:
        """For configure_optimizers: of these pieces, sharded if the strategy says so, in the model's precision.

        named  further arguments of megatron-core's get_megatron_optimizer
        """
        model: Any = self.chunks[0].config
        strategy = self._strategy
        fields = {"bf16": model.bf16, "params_dtype": model.params_dtype}
        config = replace(config, use_distributed_optimizer=strategy.distributed_optimizer, **fields)
        return MegatronOptimizer(get_megatron_optimizer(config, strategy.wrapped, **named), strategy.wrapped)

    # --- Lightning's hooks -----------------------------------------------------------------------------

    @property
    def _strategy(self) -> NeuronMegatronStrategy:
        strategy: NeuronMegatronStrategy = self.trainer.strategy
        return strategy

    def configure_model(self) -> None:
        """Build this rank's pieces, once; those of an earlier Trainer have to fit the strategy, too."""
        if not self.chunks:
            self.chunks.extend(self.chunk(*ends, stage) for stage, ends in self._strategy.pieces())
        self._strategy.check(self.chunks[0].config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Gradients of all micro-batches; returns and logs their mean loss, the same on all ranks."""
        self._strategy.optimizers[0].zero_grad()
        loss = self._run(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logs val_loss."""
        loss = self._run(batch, forward_only=True)
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """Nothing: the schedule has done it."""

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: Lightning would clear gradients between forward and backward, which are one here."""

    def _run(self, batch: Batch, forward_only: bool = False) -> Tensor:
        chunks, micro = self._strategy.wrapped, self._strategy.micro_batches(batch)

        def forward(pieces: Iterator[Batch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            piece = next(pieces)
            return self.forward_step(chunk, piece), partial(self._reported_loss, piece)

        rows, length = next(iter(batch.values())).shape[:2]
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(micro) for _ in chunks],
            model=chunks,
            num_microbatches=len(micro),
            seq_length=length,
            micro_batch_size=rows // len(micro),
            forward_only=forward_only,
        )
        return self._mean(losses)

    def _reported_loss(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor]:
        """(the share of ranks that divide a sequence, which the schedule multiplies by their number; the loss)."""
        loss = self.loss(batch, output)
        return loss / parallel_state.get_context_parallel_world_size(), loss.detach()

    def _mean(self, losses: list[Tensor]) -> Tensor:
        """Over micro-batches and data; ranks before the last stage have none."""
        mean: Tensor = torch.stack(losses).mean() if losses else torch.zeros((), device=self.device)
        torch.distributed.all_reduce(mean, group=parallel_state.get_pipeline_model_parallel_group())
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(mean, group=group)
        return mean.div_(group.size())
