"""A training loop of one's own on megatron.core: parallel state, layers, schedules, gradient buffers, optimizer,
checkpoints. As a job for CUDA has it, but for the first two lines after this text.

    python docs/examples/core/training.py --save begun --steps 2                        # one rank
    torchrun --nproc-per-node 2 docs/examples/core/training.py --load begun --tensor 2 --sequence
    torchrun --nproc-per-node 2 docs/examples/core/training.py --load begun --pipeline 2
    torchrun --nproc-per-node 2 docs/examples/core/training.py --load begun --zero      # two replicas, ZeRO-1
    ... --model mixer                                                                   # mixer.py, not a GPT

Every layout prints the losses that one rank does, also where it takes up another's checkpoint.
"""

from __future__ import annotations

import nxdt_nemo

nxdt_nemo.activate()

import argparse  # noqa: E402
import os  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from mixer import Mixer, stage_of  # noqa: E402

from nxdt_nemo.megatron.models.gpt.gpt_layer_specs import get_gpt_block_spec  # noqa: E402

LAYERS, HIDDEN, HEADS, VOCAB, SEQ, TAPS = 4, 64, 4, 256, 32, 4
MICRO_BATCH, MICRO_BATCHES = 2, 4  # of a step, over all data-parallel ranks
SEED = 1234


@dataclass(frozen=True)
class Layout:
    """Sizes of tensor and pipeline parallelism, sequence parallelism, ZeRO-1; the rest of the ranks are replicas."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    zero: bool = False


def config_of(layout: Layout) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=4 * HIDDEN,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        finalize_model_grads_func=finalize_model_grads,
    )


def build(kind: str, config: TransformerConfig) -> torch.nn.Module:
    """This pipeline rank's stage of megatron-core's GPT, or of the model next door."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if kind == "mixer":
        return Mixer(config, VOCAB, TAPS, stage_of(LAYERS), SEED, first, last)
    return GPTModel(config, get_gpt_block_spec(config), VOCAB, SEQ, pre_process=first, post_process=last)


def wrap(model: torch.nn.Module, config: TransformerConfig, zero: bool) -> tuple[Any, Any]:
    """Gradient buffers in float32, and Adam; with `zero`, each replica keeps its share of Adam's state."""
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=zero)
    replica = DistributedDataParallel(config, buffers, model)
    adam = OptimizerConfig(optimizer="adam", lr=2e-3, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=zero)
    return replica, get_megatron_optimizer(adam, [replica])


def batches(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This replica's micro-batches: tokens, each three or four more than the one before, and the tokens after them."""
    draw = torch.Generator().manual_seed(SEED + step)
    start = torch.randint(VOCAB, (MICRO_BATCHES * MICRO_BATCH, 1), generator=draw)
    noise = torch.randint(2, (MICRO_BATCHES * MICRO_BATCH, SEQ + 1), generator=draw)
    text = (start + noise.cumsum(1) + 3 * torch.arange(SEQ + 1)) % VOCAB
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for block in text.split(MICRO_BATCH)[rank::replicas]:
        yield block[:, :-1], block[:, 1:].contiguous()


def forward_step(source: Iterator[tuple[torch.Tensor, torch.Tensor]], stage: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch through this stage, and what makes a loss of a last stage's output."""
    device = next(stage.parameters()).device
    tokens, labels = (tensor.to(device) for tensor in next(source))
    if isinstance(stage.module, Mixer):
        output = stage(tokens, labels)
    else:
        output = stage(tokens, torch.arange(SEQ, device=device).expand_as(tokens), None, labels=labels)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        loss = losses.mean()
        return loss, {"loss": float(loss.detach())}

    return output, mean


def forward_backward(replica: Any, optimizer: Any, step: int) -> list[float]:
    """A step's losses, on a last stage; gradients are left in main_grad, reduced."""
    replica.zero_grad_buffer()
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(step),
        model=replica,
        num_microbatches=MICRO_BATCHES // parallel_state.get_data_parallel_world_size(),
        seq_length=SEQ,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    return [report["loss"] for report in reports]


def loss_of(losses: list[float]) -> float:
    """The mean over all replicas, on every rank: stages that have no loss count nothing."""
    total = torch.tensor([sum(losses), float(len(losses))], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def save(folder: Path, replica: Any, optimizer: Any, step: int) -> None:
    """Model and optimizer, each rank its part, in files that every layout reads."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    model = replica.module.sharded_state_dict()
    dist_checkpointing.save(
        {"model": model, "optimizer": optimizer.sharded_state_dict(model), "step": step}, str(folder)
    )


def load(folder: Path, replica: Any, optimizer: Any) -> int:
    """The step that comes next."""
    model = replica.module.sharded_state_dict()
    wanted = {"model": model, "optimizer": optimizer.sharded_state_dict(model, is_loading=True)}
    found = dist_checkpointing.load(wanted, str(folder))
    replica.module.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return int(found["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt", "mixer"), default="gpt")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism")
    parser.add_argument("--zero", action="store_true", help="the optimizer's state shared out over replicas")
    parser.add_argument("--steps", type=int, default=6, help="up to this one")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    if asked.save is not None and asked.save.exists():
        parser.error(f"--save {asked.save}: it exists; name a new folder")
    layout = Layout(asked.tensor, asked.pipeline, asked.sequence, asked.zero)

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    model_parallel_cuda_manual_seed(SEED)
    config = config_of(layout)
    replica, optimizer = wrap(build(asked.model, config).cuda(), config, layout.zero)
    begin = 0 if asked.load is None else load(asked.load, replica, optimizer)
    for step in range(begin, asked.steps):
        loss = loss_of(forward_backward(replica, optimizer, step))
        _, norm, _ = optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss!r} grad norm {float(norm)!r}", flush=True)
    if asked.save is not None:
        save(asked.save, replica, optimizer, asked.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
