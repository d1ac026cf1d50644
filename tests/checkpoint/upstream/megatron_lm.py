"""Megatron-LM's own load_checkpoint and save_checkpoint, under torchrun: `megatron_lm.py SOURCE ARGUMENTS...`.

SOURCE is a checkout of core_v0.13.1; the arguments are its own. megatron.training sets up model and optimizer, loads
--load into them, and saves to --save what each rank was given. Whatever asks for CUDA gets the CPU. The optimizers, the
distributed one too, and the formats are upstream's, unchanged; nothing of this package is imported.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, sys.argv.pop(1))
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
    """What a checkpoint sees of Apex's and TransformerEngine's: `step` is of a group, not of a parameter as in torch's
    AdamW, which 0.13.1 saves and cannot load. It takes no step here."""

    def __init__(
        self, params: Any, lr: float, weight_decay: float, betas: Any = (0.9, 0.999), eps: float = 1e-8, **_: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})


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

    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    with OnCPU():
        initialize.initialize_megatron(allow_no_cuda=True)
        args = get_args()
        made = training.setup_model_and_optimizer(provider, ModelType.encoder_or_decoder)
        print(f"loaded iteration {args.iteration}, {args.consumed_train_samples} samples", flush=True)
        save_checkpoint(args.iteration, *made, 0)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
