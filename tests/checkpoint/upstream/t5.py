"""Stock megatron-core's T5Model under torchrun: `t5.py make|load FOLDER OUT POSITIONS TIED`.

`make` writes seeded weights to FOLDER/dist with megatron.core.dist_checkpointing and to FOLDER/torch as Megatron-LM
does, one file a tensor-parallel rank; `load` reads FOLDER, of either format, strictly. Both save float32 logits of a
fixed batch to OUT; with relative positions, which no attention but TransformerEngine's takes, the first rank's weights.
Nothing of this package is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

VOCAB, SEQ = 256, 24
SIZES: dict[str, Any] = {"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "layernorm_epsilon": 1e-5}


def build(positions: str, tied: bool) -> Any:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.transformer.transformer_config import TransformerConfig

    t5_spec.TENorm = t5_spec.LNImpl
    more = {"use_cpu_initialization": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "add_bias_linear": tied}
    more |= {"gated_linear_unit": not tied, "bias_activation_fusion": False}
    more |= {"tensor_model_parallel_size": dist.get_world_size()}
    decoder, encoder = (TransformerConfig(num_layers=count, **SIZES, **more) for count in (2, 3))
    return T5Model(
        decoder,
        encoder,
        t5_spec.get_t5_encoder_with_local_block_spec(3),
        t5_spec.get_t5_decoder_with_local_block_spec(2),
        VOCAB,
        64,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=positions,
        parallel_output=False,
    ).eval()


def arguments(positions: str, tied: bool) -> argparse.Namespace:
    """What Megatron-LM keeps beside the weights, as far as it matters."""
    return argparse.Namespace(
        **{key.replace("layernorm_", "norm_"): value for key, value in SIZES.items()},
        num_layers=3,
        kv_channels=8,
        max_position_embeddings=64,
        seq_length=64,
        position_embedding_type=positions,
        untie_embeddings_and_output_weights=not tied,
        add_bias_linear=tied,
        swiglu=not tied,
        normalization="LayerNorm",
        padded_vocab_size=VOCAB,
        tensor_model_parallel_size=dist.get_world_size(),
        pipeline_model_parallel_size=1,
        consumed_train_samples=8,
    )


def save(model: Any, folder: Path, said: argparse.Namespace) -> None:
    from megatron.core import dist_checkpointing

    torch.cuda.synchronize = lambda *_: None
    (folder / "dist").mkdir(parents=True)
    state = {"args": said, "checkpoint_version": 3.0, "iteration": 2}
    dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, str(folder / "dist"))
    place = folder / f"torch/iter_0000002/mp_rank_{dist.get_rank():02d}"
    place.mkdir(parents=True)
    torch.save({**state, "model": model.state_dict_for_save_checkpoint()}, place / "model_optim_rng.pt")
    (folder / "torch/latest_checkpointed_iteration.txt").write_text("2")


def load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    ranks = folder / f"mp_rank_{dist.get_rank():02d}/model_optim_rng.pt"
    if ranks.exists():
        found = torch.load(ranks, weights_only=False)["model"]
    else:
        found = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"]
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not [key for key in (*missing, *unexpected) if "_extra_state" not in key], (missing, unexpected)


def main(what: str, folder: Path, out: Path, positions: str, tied: bool) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(dist.get_world_size())
    random.get_cuda_rng_tracker().fork = lambda *_: nullcontext()
    torch.manual_seed(5)
    model = build(positions, tied)
    if what == "make":
        with torch.no_grad():  # norms are ones and biases zeros: a misplaced one would not show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        save(model, folder, arguments(positions, tied))
    else:
        load(model, folder)
    found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    found = logits(model) if positions != "relative" else found
    if dist.get_rank() == 0:
        torch.save(found.float(), out)
    dist.barrier()
    dist.destroy_process_group()


def logits(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    source = torch.randint(0, 200, (2, SEQ), generator=draw)
    target = torch.randint(0, 200, (2, SEQ // 2), generator=draw)
    masks = [
        torch.zeros(2, 1, SEQ, SEQ),
        torch.ones(2, 1, SEQ // 2, SEQ // 2).triu(1),
        torch.zeros(2, 1, SEQ // 2, SEQ),
    ]
    with torch.no_grad():
        found: torch.Tensor = model(source, target, *(mask.bool() for mask in masks))
    return found


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5] == "tied")
