"""Mixtral: Mistral's attention, and experts for the MLP.

Room checkpoint/ (leaf). Hugging Face's w1 is the gate, w3 the up-projection, w2 the down-projection.
May import this room. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.checkpoint.families import llama
from nxdt_nemo.checkpoint.families.family import Config, Family, need
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Row, Same

__all__ = ["FAMILY"]

_HF, _EXPERT = "model.layers.{l}.block_sparse_moe.", "layers.{l}.experts.{e}."
_MLP = (
    Row(_HF + "gate.weight", Same("layers.{l}.router.weight")),
    Row(_HF + "experts.{e}.w1.weight", Same(_EXPERT + "gate.weight")),
    Row(_HF + "experts.{e}.w2.weight", Same(_EXPERT + "down.weight")),
    Row(_HF + "experts.{e}.w3.weight", Same(_EXPERT + "up.weight")),
)
_READ = ("num_local_experts", "num_experts_per_tok")


def _from_hf(config: Config) -> Model:
    model = llama.from_hf(
        config,
        family="mixtral",
        window=config.get("sliding_window"),
        experts=need(config, "num_local_experts"),
        experts_per_token=need(config, "num_experts_per_tok"),
        expert_ffn=need(config, "intermediate_size"),
    )
    return model.with_(extra={key: value for key, value in model.extra.items() if key not in _READ})


def _to_hf(model: Model) -> dict[str, Any]:
    others = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": model.window,
        "intermediate_size": model.expert_ffn,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
    }
    return {
        key: value for key, value in llama.to_hf(model, **others).items() if key not in ("attention_bias", "mlp_bias")
    }


def _is_it(model: Model) -> bool:
    return model.experts > 0 and llama.plain(model.with_(experts=0))


FAMILY = Family("mixtral", ("mixtral",), (*llama.ENDS, *llama.ATTENTION, *_MLP), _from_hf, _to_hf, _is_it)
