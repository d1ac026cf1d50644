"""Megatron-LM's own load_checkpoint, train_step and save_checkpoint, under torchrun: `megatron_lm.py SOURCE STEPS ...`.

SOURCE is a checkout of core_v0.13.1; the further arguments are its own. megatron.training sets up model and optimizer,
loads --load into them, makes STEPS steps, and saves to --save. With --decoder-seq-length the model is pretrain_t5.py's.
Whatever asks for CUDA gets the CPU. The optimizers, the distributed one too, schedules and formats are upstream's,
unchanged; nothing of this package is imported.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, sys.argv.pop(1))
STEPS = int(sys.argv.pop(1))
CPU = torch.device("cpu")


class OnCPU(TorchFunctionMode):
    """device="cuda" means the CPU, and so does Tensor.cuda."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # the optimizers tell parameters apart by it
            return func(*args).replace("torch.", "torch.cuda.")
        named = {key: _placed(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        return func(*(_placed(value) for value in args), **named)


def _placed(value: Any) -> Any:
    named = isinstance(value, str) and value.startswith("cuda")
    return CPU if named or (isinstance(value, torch.device) and value.type == "cuda") else value


def stub_cuda() -> None:
    torch.cuda.current_device = lambda: CPU
    torch.cuda.device_count = lambda: 8
    torch.cuda.set_device = lambda *_: None
    torch.cuda.manual_seed = lambda *_: None
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.set_rng_state = lambda *_, **__: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=8)
    torch.nn.Module.cuda = lambda self, *_: self


class FusedAdam(torch.optim.Optimizer):
    """Apex's and TransformerEngine's in a few lines: `step` is of a group, not of a parameter as in torch's AdamW,
    which 0.13.1 saves and cannot load."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, betas: Any = (0.9, 0.999), eps: float = 1e-8, **_: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (one, two), count = group["betas"], group["step"]
            for parameter in group["params"]:
                state, grad = self.state[parameter], parameter.grad
                if grad is None:
                    continue
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                state["exp_avg"].mul_(one).add_(grad, alpha=1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(grad, grad, value=1 - two)
                scale = (state["exp_avg_sq"] / (1 - two**count)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - one**count))


def batches(iteration: int, args: Any) -> Any:
    """Tokens and labels of an iteration's micro-batches, whatever the layout; and upstream's mask, made on the CPU."""
    draw = torch.Generator().manual_seed(1000 + iteration)
    places = torch.arange(args.seq_length)[None]
    hidden = torch.ones(1, 1, args.seq_length, args.seq_length, dtype=torch.bool).triu(1)
    for _ in range(args.global_batch_size // args.micro_batch_size):
        rows = torch.randint(0, 64, (args.micro_batch_size, args.seq_length + 1), generator=draw) * 3
        yield rows[:, :-1].contiguous(), places.expand(args.micro_batch_size, -1), hidden, rows[:, 1:].contiguous()


def mean(losses: Any) -> Any:
    loss = losses.float().mean()
    return loss, {"lm loss": loss.detach()}


def forward(data: Any, model: Any) -> Any:
    tokens, places, hidden, labels = next(data)
    return model(tokens, places, hidden, labels=labels), mean


def forward_t5(data: Any, model: Any) -> Any:
    """The decoder is to say what follows the encoder's tokens."""
    tokens, _, hidden, labels = next(data)
    seen = torch.zeros_like(hidden)
    return model(tokens, tokens, seen, hidden, seen, lm_labels=labels), mean


def train(made: Any, steps: int) -> None:
    """Steps by upstream's train_step; the last stage prints each loss."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config
    from megatron.training import get_args, training

    model, optimizer, scheduler = made
    args, config = get_args(), get_model_config(model[0])
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    for _ in range(steps):
        args.curr_iteration = args.iteration
        step = forward if args.decoder_seq_length is None else forward_t5
        losses, *_ = training.train_step(step, batches(args.iteration, args), model, optimizer, scheduler, config)
        args.iteration += 1
        args.consumed_train_samples += args.global_batch_size
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            print(f"loss {args.iteration} {float(losses['lm loss']):.9f}", flush=True)


def save_as_zarr(args: Any) -> None:
    """megatron-core 0.13.1 writes zarr, but Megatron-LM's save_checkpoint no longer asks it to."""
    from megatron.core.dist_checkpointing.strategies.zarr import ZarrSaveShardedStrategy
    from megatron.training import checkpointing

    args.ckpt_format = "torch_dist"
    checkpointing.get_default_save_sharded_strategy = lambda *_: ZarrSaveShardedStrategy("zarr", 1)


def main() -> None:
    stub_cuda()
    from megatron.core import optimizer as optimizers
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.training import get_args, initialize, training
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.checkpointing import save_checkpoint

    moe_utils.te_general_gemm = None
    initialize._compile_dependencies = lambda: None  # of the datasets
    tracker = random.get_cuda_rng_tracker()
    tracker.fork = lambda *_: nullcontext()
    tracker.add("model-parallel-rng", 1) if not tracker.get_states() else None

    def provider(pre_process: bool = True, post_process: bool = True) -> Any:
        args = get_args()
        config = core_transformer_config_from_args(args)
        if args.use_legacy_models:
            from megatron.legacy.model import GPTModel as Legacy

            return Legacy(config, 0, True, pre_process, post_process)
        spec = get_gpt_layer_local_spec(
            args.num_experts, args.moe_grouped_gemm, args.qk_layernorm, normalization=args.normalization
        )
        return GPTModel(
            config,
            spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
        )

    # 0.13.1 copies into float32 weights, of which the main parameters are views, with gradients on.
    sharded = distrib_optimizer.DistributedOptimizer
    sharded.load_parameter_state_from_dp_zero = torch.no_grad()(sharded.load_parameter_state_from_dp_zero)
    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    more: dict[str, Any] = {"allow_no_cuda": True}
    kind = ModelType.encoder_or_decoder
    if "--decoder-seq-length" in sys.argv:
        import pretrain_t5
        from megatron.core.models.T5 import t5_spec

        t5_spec.TENorm = t5_spec.LNImpl
        provider, kind = pretrain_t5.model_provider, ModelType.encoder_and_decoder
        more["get_embedding_ranks"] = pretrain_t5.t5_embedding_ranks
        more["get_position_embedding_ranks"] = pretrain_t5.t5_position_embedding_ranks
    with OnCPU():
        initialize.initialize_megatron(**more)
        args = get_args()
        made = training.setup_model_and_optimizer(provider, kind)
        print(f"loaded iteration {args.iteration}, {args.consumed_train_samples} samples", flush=True)
        train(made, STEPS)
        if args.ckpt_format == "zarr":
            save_as_zarr(args)
        save_checkpoint(args.iteration, *made, 0)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
