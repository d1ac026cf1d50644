"""Our side of a parity table: the same tiny models through the active backend, in any layout.

Room testing/. Runs in ranks whose pool was started with init="nxdt_nemo:activate". The layers are the backend's;
parallel state, schedules, gradient buffers and optimizer are megatron-core's under their own names, as the backend
has changed them. Proof: tests/megatron/test_parity.py.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nxdt_nemo.runtime import current
from nxdt_nemo.testing.families import Stage, build, config_of, losses_of, mean_of, stock_specs
from nxdt_nemo.testing.mistakes import Fault, Training, mistake
from nxdt_nemo.testing.pool import lane_here
from nxdt_nemo.testing.recipe import Batch, Layout, Recipe, micro_batches
from nxdt_nemo.testing.reference import Trained, parameters_of
from nxdt_nemo.testing.weights import Piece, Ranks, global_names, load, merge, piece

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = [
    "ACTIVE",
    "ACTIVE_ENV",
    "Part",
    "assemble",
    "forward_backward",
    "gradients_of",
    "load_checkpoint",
    "our_specs",
    "save_checkpoint",
    "set_up",
    "train",
    "update",
]

Read = Callable[[Any], Any]

ACTIVE = "nxdt_nemo:activate"  # a pool's init
ACTIVE_ENV = {"NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0"}
_WRAPPED: weakref.WeakSet[Any] = weakref.WeakSet()  # megatron-core's DistributedDataParallel


@dataclass
class Part:
    """One rank's report. Losses are a last stage's, of its own micro-batches; gradients and weights are pieces.

    state_bytes   what the optimizer holds beyond the model's parameters and gradients: moments, main parameters
    """

    tp_rank: int
    state_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    grads: list[tuple[str, Piece]] = field(default_factory=list)
    weights: list[tuple[str, Piece]] = field(default_factory=list)


def assemble(parts: list[Part]) -> tuple[Trained, float]:
    """The undivided model's view of all ranks' reports, and how far copies differ (see weights.merge)."""
    last = [part.losses for part in parts if part.losses and part.tp_rank == 0]
    grads, spread = merge([part.grads for part in parts])
    weights, _ = merge([part.weights for part in parts])
    losses = [sum(step) / len(step) for step in zip(*last, strict=True)]
    return Trained(losses, parts[0].grad_norms, grads, weights), spread


def train(
    recipe: Recipe,
    weights: dict[str, torch.Tensor],
    layout: Layout,
    fault: Fault = "",
    steps: range | None = None,
    resume: Path | None = None,
    save: Path | None = None,
    ddp: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Part:
    """One rank's part of a run: build its stage, load its share of the weights, train.

    steps          those of the recipe to make (default: all)
    resume, save   megatron-core distributed checkpoints to begin with and to end with
    ddp            further fields of megatron-core's DistributedDataParallelConfig
    fields         further ones of the TransformerConfig
    """
    lane_here()  # unless the pool has
    try:
        return _train(recipe, weights, layout, fault, steps, resume, save, ddp or {}, fields)
    finally:
        forget_groups()


def _train(
    recipe: Recipe,
    weights: dict[str, torch.Tensor],
    layout: Layout,
    fault: Fault,
    steps: range | None,
    resume: Path | None,
    save: Path | None,
    ddp: Mapping[str, Any],
    fields: Mapping[str, Any] | None,
) -> Part:
    training = set_up(recipe, weights, layout, ddp, fields)
    ranks, report = Ranks.here(), Part(Ranks.here().tp[0])
    if resume is not None:
        load_checkpoint(training.model, training.optimizer, resume, fault)
    with mistake(fault, training):
        _steps(report, recipe, layout, training, range(recipe.steps) if steps is None else steps)
    report.state_bytes = state_bytes(training.optimizer, training.model)
    if save is not None:
        save_checkpoint(training.model, training.optimizer, save)
    for chunk in training.chunks if ddp.get("overlap_param_gather") else ():
        chunk.start_param_sync(force_sync=True)  # else a next forward pass would
    report.weights = [(name, piece(name, p, p, recipe.gated, ranks)) for name, p in training.named]
    return report


def set_up(
    recipe: Recipe,
    weights: dict[str, torch.Tensor] | None,
    layout: Layout,
    ddp: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Training:
    """Parallel state, this rank's part of the model, its gradient buffers and optimizer.

    weights  None: as upstream initializes them; parameters then have no names in the undivided model
    fields   further ones of the TransformerConfig
    """
    from megatron.core.distributed import finalize_model_grads

    state = _model_parallel(recipe, layout, (ddp or {}).get("num_distributed_optimizer_instances", 1))
    model = _stages(recipe, layout, state, fields)
    if weights is not None:
        load(model, weights, recipe.gated, Ranks.here())
    model = [current().place(stage) for stage in model]
    chunks, optimizer = _wrap(model, recipe, layout.zero, ddp)
    model[0].config.finalize_model_grads_func = finalize_model_grads
    named = [] if weights is None else list(global_names(model, weights, Ranks.here()))
    return Training(model, chunks, optimizer, named)


def _steps(report: Part, recipe: Recipe, layout: Layout, training: Training, steps: range) -> None:
    """Train, and write losses, norms and the first step's gradients down."""
    ranks = Ranks.here()
    for step in steps:
        losses = gradients_of(training, recipe, layout, step)
        if losses:
            report.losses.append(sum(losses) / len(losses))
        if not report.grads:
            gather_gradients(training.optimizer)
            report.grads = [(name, piece(name, p, p.main_grad, recipe.gated, ranks)) for name, p in training.named]
        report.grad_norms.append(update(training.optimizer, recipe, step))


def gradients_of(training: Training, recipe: Recipe, layout: Layout, step: int, read: Read = float) -> list[Any]:
    """A step's forward and backward passes; returns the losses of this rank's micro-batches, see forward_backward."""
    from megatron.core import parallel_state

    batches = micro_batches(recipe, step)[parallel_state.get_data_parallel_rank() :: layout.dp]
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    return forward_backward(training.chunks, recipe, batches, read)


def update(optimizer: Any, recipe: Recipe, step: int, read: Read = float) -> Any:
    """The optimizer's step; returns the gradients' norm, as `read` makes it of upstream's.

    The training step ends where the caller says, on a lane that traces.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(step)
        group["weight_decay"] = recipe.weight_decay * group["wd_mult"]
    with current().step_goes_on():
        return read(optimizer.step()[1])


def _model_parallel(recipe: Recipe, layout: Layout, instances: int = 1) -> Any:
    """megatron-core's parallel state for this layout, from scratch: a pool's ranks serve many layouts."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    forget_groups()
    apart = recipe.family == "t5" and layout.pp > 1  # the encoder has pipeline ranks, and embeddings, of its own
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp // 2 if apart else layout.pp,
        layout.vpp or None,
        encoder_pipeline_model_parallel_size=layout.pp // 2 if apart else 0,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp or None,
        num_distributed_optimizer_instances=instances,
        get_embedding_ranks=_t5_embeddings if apart else None,
        get_position_embedding_ranks=_t5_positions if apart else None,
    )
    model_parallel_cuda_manual_seed(recipe.seed)
    return parallel_state


def _t5_embeddings(stages: list[int], _: int | None = None) -> list[int]:
    """Ranks of a pipeline that hold word embeddings: both sides' first, and the last for its output layer."""
    return sorted({*_t5_positions(stages), stages[-1]})


def _t5_positions(stages: list[int], _: int | None = None) -> list[int]:
    return [stages[0], stages[len(stages) // 2]]


def forget_groups() -> None:
    """Close every group but the world, which a destroyed parallel state only forgets.

    Each has a gloo thread that wakes up a hundred times a second: the groups of some pools at rest keep two cores busy.
    All ranks call it. They meet first: one that closes a group while another still connects to it ends the other.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    if sys.exc_info()[0] is None:  # a rank that fails goes alone
        dist.barrier()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # Layers hold groups, and layers are in cycles. One goes through autograd, where gc cannot see it: DDP's hooks hold
    # the DDP, and a dispatcher of experts keeps probabilities, whose graph holds the parameters that have the hooks.
    for chunk in list(_WRAPPED):
        chunk._modules.clear()
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None:  # remembers its last 32 modules, and they their groups
        rotary.RotaryEmbedding.forward.cache_clear()
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None:  # keeps groups, and a place for each layer of the first model that had experts
        moe.get_moe_layer_wise_logging_tracker().clear()
    gc.collect()


def _stages(recipe: Recipe, layout: Layout, state: Any, fields: Mapping[str, Any] | None = None) -> list[Any]:
    """This rank's pipeline stage, or its chunks, built from the backend's layer specs.

    fields  further ones of the TransformerConfig
    """
    import torch

    dtype = getattr(torch, recipe.dtype)
    config = config_of(
        recipe,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=max(layout.pp // 2, 1) if recipe.family == "t5" else layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp or None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp or layout.tp,
        sequence_parallel=layout.sp,
        num_layers_in_first_pipeline_stage=layout.first or None,
        num_layers_in_last_pipeline_stage=layout.last or None,
        pipeline_model_parallel_layout=layout.pipeline_layout,
        account_for_embedding_in_pipeline_split=layout.account,
        account_for_loss_in_pipeline_split=layout.account,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=recipe.dtype == "bfloat16",
        gradient_accumulation_fusion=True,  # as NeMo's configurations have it, which stock cannot without CUDA
        apply_rope_fusion=recipe.gated,
        **({"moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": layout.grouped} if recipe.experts else {}),
        **(fields or {}),
    )
    config.moe_dropless_bound = "worst" if layout.static else None
    config.kv_head_order = layout.kv_head_order
    stages = [_stage_of(recipe, state, index if layout.vpp else None) for index in range(layout.chunks)]
    return [build(recipe, config, our_specs, stage).to(dtype) for stage in stages]


def _stage_of(recipe: Recipe, state: Any, virtual: int | None) -> Stage:
    if recipe.family == "t5" and state.get_pipeline_model_parallel_world_size() > 1:
        rank, last = state.get_pipeline_model_parallel_rank(), state.get_pipeline_model_parallel_world_size() - 1
        first = state.get_pipeline_model_parallel_decoder_start()
        return Stage(rank in (0, first), rank in (first - 1, last), None, rank < first, rank >= first)
    place = {"ignore_virtual": False, "vp_stage": virtual}
    return Stage(state.is_pipeline_first_stage(**place), state.is_pipeline_last_stage(**place), virtual)


def our_specs(block: str, config: Any, virtual: int | None) -> Any:
    """The backend's layers for a block of a model, see families.Specs."""
    from nxdt_nemo.megatron.models.backends import adapt
    from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec

    if block == "gpt":
        return get_gpt_block_spec(config, virtual)
    return adapt(stock_specs(block, config, virtual))


def _parameters(model: list[Any]) -> dict[str, Any]:
    """All chunks' entries; each is saved under its name in the whole model."""
    return {f"{i}.{name}": entry for i, chunk in enumerate(model) for name, entry in parameters_of(chunk).items()}


def save_checkpoint(model: list[Any], optimizer: Any, folder: Path) -> None:
    """As a plain megatron-core loop saves."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = _parameters(model)
    dist_checkpointing.save({"model": state, "optimizer": optimizer.sharded_state_dict(state)}, str(folder))


def load_checkpoint(model: list[Any], optimizer: Any, folder: Path, fault: Fault) -> None:
    """As a plain megatron-core loop resumes, or so that Adam's moments are zero."""
    from megatron.core import dist_checkpointing

    state = _parameters(model)
    wanted = {"model": state, "optimizer": optimizer.sharded_state_dict(state, is_loading=True)}
    found = dist_checkpointing.load(wanted, str(folder))
    for i, chunk in enumerate(model):
        mine = {name: tensor for name, tensor in found["model"].items() if name.startswith(f"{i}.")}
        chunk.load_state_dict({name.partition(".")[2]: tensor for name, tensor in mine.items()}, strict=False)
    if fault == "moments not resumed":
        inner = found["optimizer"].get("optimizer", found["optimizer"])  # with main parameters one level below
        for moments in inner["state"].values():
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].zero_()
    optimizer.load_state_dict(found["optimizer"])


def gather_gradients(optimizer: Any) -> None:
    """Make a sharded optimizer's gradients whole on each rank, as an unsharded one's are."""
    import torch.distributed as dist

    sharded = [one for one in getattr(optimizer, "chained_optimizers", [optimizer]) if hasattr(one, "buckets")]
    for bucket in (bucket for one in sharded for bucket in one.buckets):
        mine = bucket.grads[slice(*bucket.part(bucket.group.rank()))].clone()
        dist.all_gather_into_tensor(bucket.grads, mine, group=bucket.group)


def state_bytes(optimizer: Any, model: list[Any]) -> int:
    """Bytes of an optimizer's tensors, without those that lie in the model's own memory."""
    models = {param.untyped_storage().data_ptr() for chunk in model for param in chunk.parameters()}
    tensors = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", one)
        tensors += [inner.state[param][name] for param in inner.state for name in ("exp_avg", "exp_avg_sq")]
        tensors += [param for group in inner.param_groups for param in group["params"]]
    own = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in models]
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


def _wrap(
    model: list[Any], recipe: Recipe, zero: bool = False, ddp: Mapping[str, Any] | None = None
) -> tuple[list[Any], Any]:
    """Gradient buffers (reduced in float32) and the optimizer, as Megatron's own training loop makes them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    buckets = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=zero, **(ddp or {}))
    chunks = [DistributedDataParallel(one.config, buckets, one) for one in model]
    _WRAPPED.update(chunks)
    if buckets.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in chunks]
        model[0].config.no_sync_func = waits if len(chunks) > 1 else waits[0]
    adam = OptimizerConfig(
        optimizer="adam",
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        adam_eps=recipe.eps,
        clip_grad=recipe.clip,
        use_distributed_optimizer=zero,
        bf16=recipe.dtype == "bfloat16",
    )
    return chunks, get_megatron_optimizer(adam, chunks)


def forward_backward(chunks: list[Any], recipe: Recipe, batches: list[Batch], read: Read = float) -> list[Any]:
    """Each micro-batch's loss (on the last stage, else none), as `read` makes it of a tensor; gradients are left in
    main_grad, reduced."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    lane = current()
    loss_dtype = torch.float64 if lane.supports(torch.float64) else torch.float32

    def forward(source: Any, stage: Any) -> tuple[torch.Tensor, Any]:
        whole = next(source)
        batch, positions = _zigzag(whole, cp, cp_rank)

        def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            known = mean_of(losses.detach().to(loss_dtype), recipe, batch, math.prod(whole.labels.shape))
            # the schedule multiplies by the context parallel size, since it averages over these ranks' gradients
            return mean_of(losses.float(), recipe, batch, math.prod(whole.labels.shape)), {"loss": read(known) * cp}

        return losses_of(stage, recipe, batch, positions), loss_of

    sources = [iter(batches) for _ in chunks]
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=sources if len(chunks) > 1 else sources[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=recipe.seq,
        micro_batch_size=recipe.micro_batch,
        decoder_seq_length=recipe.seq // 2 if recipe.family == "t5" else None,
        forward_only=False,
    )
    return [result["loss"] for result in results]


def _zigzag(batch: Batch, cp: int, rank: int) -> tuple[Batch, torch.Tensor]:
    """A context parallel rank's tokens, and their positions: chunks rank and 2 cp - 1 - rank of 2 cp."""
    import numpy as np
    import torch

    seq = batch.tokens.shape[1]
    chunks = np.arange(seq).reshape(2 * cp, -1)
    mine = np.concatenate([chunks[rank], chunks[-1 - rank]]) if cp > 1 else np.arange(seq)
    if cp > 1:
        batch = replace(batch, tokens=batch.tokens[:, mine], labels=batch.labels[:, mine])
    return batch, torch.from_numpy(mine)
