"""Logits by stock megatron-core on one CPU rank: `python -m nxdt_nemo.audit.logits.megatron FORMAT FOLDER MODEL OUT`.

Room audit/. MODEL is a JSON file of checkpoint/model.py's numbers. `torch_dist` is loaded by
megatron.core.dist_checkpointing; of the `torch` format each rank's state is loaded strictly into a model of that rank's
size, and shards are joined by the marks that megatron-core puts on its parameters. Our backend is not active.
Imports torch and megatron-core; nothing of ours but the batch. Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nxdt_nemo.audit.logits import tokens

__all__ = ["main"]

_LAYER, _EXPERT = re.compile(r"(decoder\.layers\.)(\d+)"), re.compile(r"(local_experts\.)(\d+)")


def main(kind: str, folder: Path, model_file: Path, out: Path) -> None:
    """Write float32 logits [BATCH, LENGTH, padded vocabulary] of the folder's model, computed in float32."""
    os.environ.update(TORCHDYNAMO_DISABLE="1", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_port())
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.13.1 names it only with TransformerEngine, and asks always
        moe_utils.te_general_gemm = None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]  # upstream makes buffers there
    said = json.loads(model_file.read_text())
    dist.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    random.get_cuda_rng_tracker().fork = lambda *_: nullcontext()  # it keeps states of the GPU; nothing drops out here
    model = _build(said).eval()
    if kind == "torch_dist":
        _load_distributed(model, folder, str(said.get("prefix", "")))
    else:
        _load_ranks(model, folder, said)
    ids = torch.tensor(tokens(said["vocab"]))
    places = torch.arange(ids.shape[1]).expand_as(ids)
    every = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
    hidden = every.triu(1) | every.tril(-(said["window"] or ids.shape[1]))  # its own attention has no window_size
    with torch.no_grad():
        torch.save(model(ids, places, hidden[None, None]).float(), out)
    dist.destroy_process_group()


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _build(said: Mapping[str, Any]) -> Any:
    """A GPTModel of megatron-core's local layers with these sizes, in float32."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    scaling = said["rope_scaling"] or {}
    config = TransformerConfig(
        num_layers=said["layers"],
        hidden_size=said["hidden"],
        ffn_hidden_size=said["ffn"],
        num_attention_heads=said["heads"],
        num_query_groups=said["groups"],
        kv_channels=said["head_size"],
        normalization=said["norm"],
        layernorm_epsilon=said["norm_eps"],
        layernorm_zero_centered_gamma=said["norm_from_one"],
        gated_linear_unit=said["activation"] in ("swiglu", "geglu"),
        activation_func=_activation(said["activation"]),
        add_bias_linear=said["bias"],
        add_qkv_bias=said["qkv_bias"] and not said["bias"],
        qk_layernorm=said["qk_norm"],
        num_moe_experts=said["experts"] or None,
        moe_ffn_hidden_size=said["expert_ffn"] or None,
        moe_router_topk=said["experts_per_token"],
        moe_router_load_balancing_type="none",
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        params_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=said["qk_norm"], normalization=said["norm"]
    )
    return GPTModel(
        config,
        spec,
        vocab_size=said["padded_vocab"],
        max_sequence_length=said["positions"],
        share_embeddings_and_output_weights=said["tied"],
        position_embedding_type="learned_absolute" if said["learned_positions"] else "rope",
        rotary_percent=said["rope_fraction"],
        rotary_base=int(said["rope_base"]),
        rope_scaling=bool(scaling),
        rope_scaling_factor=float(scaling.get("factor", 8.0)),
    )


def _activation(name: str) -> Any:
    import torch.nn.functional as F

    def tanh_gelu(x: Any) -> Any:
        return F.gelu(x, approximate="tanh")

    def squared_relu(x: Any) -> Any:
        return F.relu(x).square()

    table = {"swiglu": F.silu, "gelu": F.gelu, "geglu": tanh_gelu, "openai_gelu": tanh_gelu, "relu": F.relu}
    return {**table, "squared_relu": squared_relu}[name]


def _load_distributed(model: Any, folder: Path, prefix: str) -> None:
    from megatron.core import dist_checkpointing

    wanted = model.sharded_state_dict(prefix=prefix)
    known = dist_checkpointing.load_tensors_metadata(str(folder))
    for part in wanted.values():  # the norm before experts has another name where TransformerEngine's layers load it
        if part.key not in known:
            part.key = part.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    loaded = dist_checkpointing.load(wanted, str(folder))
    found = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
    own = set(model.state_dict())
    model.load_state_dict({key: value for key, value in found.items() if key in own})


def _load_ranks(model: Any, folder: Path, said: Mapping[str, Any]) -> None:
    """All files of the `torch` format: layers and experts renumbered, shards joined along the marked dimension."""
    import torch

    pp, vpp, ep = (int(said[name]) for name in ("pp", "vpp", "ep"))
    stages = said["stages"] or [said["layers"] // (pp * vpp)] * (pp * vpp)
    shards: dict[str, list[Any]] = {}
    for place in sorted(folder.iterdir()):
        numbers = [int(number) for number in re.findall(r"\d+", place.name)]
        if not place.name.startswith("mp_rank_"):
            continue
        stage = numbers[1] if pp > 1 else 0
        group = numbers[-1] if ep > 1 else 0
        state = torch.load(place / "model_optim_rng.pt", weights_only=False)
        for chunk in range(vpp):
            before = sum(stages[: chunk * pp + stage])
            for key, value in state[f"model{chunk}" if vpp > 1 else "model"].items():
                name = _renumbered(_EXPERT, _renumbered(_LAYER, key, before), group * said["experts"] // ep)
                if isinstance(value, torch.Tensor) and (group == 0 or "experts" in name):
                    shards.setdefault(name, []).append(value.float())
    marks = dict(model.named_parameters())
    if said["tied"]:
        shards.pop("output_layer.weight", None)
    whole = {
        name: _join(parts, marks[name], name, said["activation"] in ("swiglu", "geglu"))
        for name, parts in shards.items()
    }
    missing = [key for key in model.load_state_dict(whole, strict=False).missing_keys if "_extra_state" not in key]
    assert not [key for key in missing if not (said["tied"] and key == "output_layer.weight")], missing


def _renumbered(pattern: re.Pattern[str], key: str, before: int) -> str:
    return pattern.sub(lambda found: f"{found[1]}{int(found[2]) + before}", key)


def _join(parts: list[Any], parameter: Any, name: str, gated: bool) -> Any:
    import torch

    if parts[0].shape == parameter.shape:
        return parts[0]
    dim = next(dim for dim, n in enumerate(parameter.shape) if n != parts[0].shape[dim])
    if gated and "linear_fc1" in name:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, dim)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]))
