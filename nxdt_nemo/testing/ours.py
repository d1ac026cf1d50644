"""Our side of a parity table: the same tiny models through the active backend, in any layout.

Room testing/. Runs in ranks whose pool was started with init="nxdt_nemo:activate". The layers are the backend's;
parallel state, schedules, gradient buffers and optimizer are megatron-core's under their own names, as the backend
has changed them. Proof: tests/megatron/test_parity.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nxdt_nemo.testing.recipe import Batch, Layout, Recipe, micro_batches, transformer_fields
from nxdt_nemo.testing.reference import Trained, parameters_of
from nxdt_nemo.testing.weights import Piece, global_names, load, merge, piece

if TYPE_CHECKING:
    from pathlib import Path

    import torch

__all__ = ["ACTIVE", "ACTIVE_ENV", "Fault", "Part", "assemble", "train"]

ACTIVE = "nxdt_nemo:activate"  # a pool's init
ACTIVE_ENV = {"NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0"}

# Mistakes made on purpose, each of which must turn a table red.
Fault = Literal["", "norm gradients not reduced", "one gradient x 1.01", "moments not resumed"]
SCALED = "decoder.layers.1.mlp.linear_fc2.weight"


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


def assemble(parts: list[Part], layout: Layout) -> tuple[Trained, float]:
    """The undivided model's view of all ranks' reports, and how far copies differ (see weights.merge)."""
    last = [part.losses for part in parts if part.losses and part.tp_rank == 0]
    grads, spread = merge([part.grads for part in parts], layout.tp)
    weights, _ = merge([part.weights for part in parts], layout.tp)
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
) -> Part:
    """One rank's part of a run: build its stage, load its share of the weights, train.

    steps          those of the recipe to make (default: all)
    resume, save   megatron-core distributed checkpoints to begin with and to end with
    ddp            further fields of megatron-core's DistributedDataParallelConfig
    """
    ddp = ddp or {}
    state = _model_parallel(recipe, layout, ddp.get("num_distributed_optimizer_instances", 1))
    tp_rank, dp_rank = state.get_tensor_model_parallel_rank(), state.get_data_parallel_rank()
    gated = recipe.family == "llama"
    model = _stage(recipe, layout, state)
    load(model, weights, gated, layout.tp, tp_rank)
    chunk, optimizer = _wrap(model, recipe, layout.zero, ddp)
    finish = _finalizer(model, weights, fault)
    chunk.config.finalize_model_grads_func = finish
    report = Part(tp_rank)
    if resume is not None:
        _load(model, optimizer, resume, fault)
    for step in range(recipe.steps) if steps is None else steps:
        batches = micro_batches(recipe, step)[dp_rank :: layout.dp]
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = _forward_backward(chunk, recipe, batches)
        if losses:
            report.losses.append(sum(losses) / len(losses))
        named = list(global_names(model, weights))
        if not report.grads:
            gather_gradients(optimizer)
            report.grads = [(name, piece(name, p, p.main_grad, gated, tp_rank)) for name, p in named]
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
            group["weight_decay"] = recipe.weight_decay * group["wd_mult"]
        report.grad_norms.append(float(optimizer.step()[1]))
    report.state_bytes = state_bytes(optimizer, model)
    if save is not None:
        _save(model, optimizer, save)
    report.weights = [(name, piece(name, p, p, gated, tp_rank)) for name, p in global_names(model, weights)]
    return report


def _model_parallel(recipe: Recipe, layout: Layout, instances: int = 1) -> Any:
    """megatron-core's parallel state for this layout, from scratch: a pool's ranks serve many layouts."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        _close_groups()
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, num_distributed_optimizer_instances=instances)
    model_parallel_cuda_manual_seed(recipe.seed)
    return parallel_state


def _close_groups() -> None:
    """Close every group but the world: a destroyed state only forgets them, and each keeps gloo threads running."""
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _stage(recipe: Recipe, layout: Layout, state: Any) -> Any:
    """This rank's pipeline stage, built from the backend's layer specs."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec

    llama, dtype = recipe.family == "llama", getattr(torch, recipe.dtype)
    config = TransformerConfig(
        **transformer_fields(recipe),
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=recipe.dtype == "bfloat16",
        gradient_accumulation_fusion=True,  # as NeMo's configurations have it, which stock cannot without CUDA
        apply_rope_fusion=llama,
    )
    model = GPTModel(
        config,
        get_gpt_block_spec(config),
        vocab_size=recipe.vocab,
        max_sequence_length=recipe.seq,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not llama,
        position_embedding_type="rope" if llama else "learned_absolute",
    )
    return model.to(dtype)


def _save(model: Any, optimizer: Any, folder: Path) -> None:
    """As a plain megatron-core loop saves."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = parameters_of(model)
    dist_checkpointing.save({"model": state, "optimizer": optimizer.sharded_state_dict(state)}, str(folder))


def _load(model: Any, optimizer: Any, folder: Path, fault: Fault) -> None:
    """As a plain megatron-core loop resumes, or so that Adam's moments are zero."""
    from megatron.core import dist_checkpointing

    state = parameters_of(model)
    wanted = {"model": state, "optimizer": optimizer.sharded_state_dict(state, is_loading=True)}
    found = dist_checkpointing.load(wanted, str(folder))
    model.load_state_dict(found["model"], strict=False)
    if fault == "moments not resumed":
        for moments in found["optimizer"]["state"].values():
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


def state_bytes(optimizer: Any, model: Any) -> int:
    """Bytes of an optimizer's tensors, without those that lie in the model's own memory."""
    models = {param.untyped_storage().data_ptr() for param in model.parameters()}
    tensors = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", one)
        tensors += [inner.state[param][name] for param in inner.state for name in ("exp_avg", "exp_avg_sq")]
        tensors += [param for group in inner.param_groups for param in group["params"]]
    own = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in models]
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


def _wrap(model: Any, recipe: Recipe, zero: bool = False, ddp: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Gradient buffers (reduced in float32) and the optimizer, as Megatron's own training loop makes them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    buckets = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=zero, **(ddp or {}))
    chunk = DistributedDataParallel(model.config, buckets, model)
    if buckets.overlap_grad_reduce:
        model.config.no_sync_func = chunk.no_sync
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
    return chunk, get_megatron_optimizer(adam, [chunk])


def _forward_backward(chunk: Any, recipe: Recipe, batches: list[Batch]) -> list[float]:
    """Each micro-batch's loss (on the last stage, else none); gradients are left in main_grad, reduced."""
    import torch
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return losses.float().mean(), {"loss": float(losses.detach().double().mean())}

    def forward(source: Any, stage: Any) -> tuple[torch.Tensor, Any]:
        batch = next(source)
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return stage(tokens, positions, None, labels=labels), loss_of

    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=chunk,
        num_microbatches=len(batches),
        seq_length=recipe.seq,
        micro_batch_size=recipe.micro_batch,
        forward_only=False,
    )
    return [result["loss"] for result in results]


def _finalizer(model: Any, weights: dict[str, torch.Tensor], fault: Fault) -> Any:
    """finalize_model_grads, or one that makes a mistake."""
    # by name: the package's attribute of the same name is the function
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    plain, reduce_norms = module.finalize_model_grads, module._allreduce_non_tensor_model_parallel_grads

    def unreduced(*args: Any, **named: Any) -> None:
        module._allreduce_non_tensor_model_parallel_grads = lambda *_: None  # type: ignore[attr-defined]
        try:
            plain(*args, **named)
        finally:
            module._allreduce_non_tensor_model_parallel_grads = reduce_norms  # type: ignore[attr-defined]

    def scaled(*args: Any, **named: Any) -> None:
        plain(*args, **named)
        for name, parameter in global_names(model, weights):
            if name == SCALED:
                parameter.main_grad.mul_(1.01)

    faults = {"norm gradients not reduced": unreduced, "one gradient x 1.01": scaled}
    return faults.get(fault, plain)
