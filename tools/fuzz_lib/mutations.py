"""Seeded mistakes in a configuration. What each must lead to is decided here, without the tables that judge it.

typo           a key with two letters swapped, one left out, doubled or changed: an error that names the right key
wrong type     a value of another kind: an error
out of range   a number far below or above what it can be: an error
deleted        a key left out: an error, or its default is listed
contradiction  two keys that exclude each other: an error
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

KINDS = ("typo", "wrong type", "out of range", "deleted", "contradiction")
# Somebody's constructor arguments, which are anybody's: not judged, and so not mutated.
FREE = ("_kwargs", "hydra")
SECTIONS = ("trainer", "exp_manager", "model")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAR = 1_000_003
# A list is no mistake there: the devices by number.
NOT_WRONG = {"trainer.devices": list}
FRACTIONS = (
    "dropout",
    "_prob",
    "rotary_percentage",
    "init_method_std",
    "layernorm_epsilon",
    "lr",
    "min_lr",
    "weight_decay",
)


@dataclass(frozen=True)
class Mutation:
    """One mistake. key: what it is about; meant: the key that a typo stands for; text: for the table."""

    kind: str
    key: str
    text: str
    meant: str = ""


def leaves(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below the sections that NeMo reads, with its value; sections too."""
    for key, value in node.items():
        inner = f"{path}.{key}" if path else key
        if path == "" and key not in SECTIONS:
            continue
        if path:
            yield inner, value
        if isinstance(value, dict) and not key.endswith(FREE):
            yield from leaves(value, inner)


def section_of(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The dictionary that has a key."""
    node = config
    for name in path.split(".")[:-1]:
        node = node[name]
    return node


def mutate(config: dict[str, Any], kind: str, draw: random.Random, known: Callable[[str], bool]) -> Mutation | None:
    """Make one mistake in a plain configuration, in place; None where it has no place for one.

    known   whether a name is a key of NeMo: such a misspelling is another key, no typo
    """
    return {
        "typo": _typo,
        "wrong type": _wrong_type,
        "out of range": _out_of_range,
        "deleted": _deleted,
        "contradiction": _contradiction,
    }[kind](config, draw, known)


def _pick(config: dict[str, Any], draw: random.Random, wanted: Callable[[str, Any], bool]) -> str:
    return draw.choice([path for path, value in leaves(config) if wanted(path, value)])


# --- typo ---------------------------------------------------------------------------------------------------------


def misspelt(name: str, draw: random.Random) -> str:
    """One slip of a hand."""
    at = draw.randrange(len(name) - 1)
    match draw.randrange(4):
        case 0:
            return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
        case 1:
            return name[:at] + name[at + 1 :]
        case 2:
            return name[:at] + name[at] + name[at:]
    return name[:at] + draw.choice(LETTERS) + name[at + 1 :]


def _typo(config: dict[str, Any], draw: random.Random, known: Callable[[str], bool]) -> Mutation | None:
    path = _pick(config, draw, lambda path, _: len(path.rpartition(".")[2]) > 2)
    above, _, name = path.rpartition(".")
    wrong = misspelt(name, draw)
    node = section_of(config, path)
    if wrong in node or known(f"{above}.{wrong}") or wrong == name:
        return None
    items = [(wrong if key == name else key, value) for key, value in node.items()]
    node.clear()
    node.update(items)
    return Mutation("typo", f"{above}.{wrong}", f"{path} -> {wrong}", meant=name)


# --- wrong type ---------------------------------------------------------------------------------------------------


def _wrong_type(config: dict[str, Any], draw: random.Random, _: Callable[[str], bool]) -> Mutation | None:
    path = _pick(config, draw, lambda path, value: value is not None and not _is_reference(value))
    node, name = section_of(config, path), path.rpartition(".")[2]
    value = node[name]
    match value:
        case bool():
            wrong: Any = draw.choice(["maybe", [True], {"on": True}, 17])
        case int() | float():
            wrong = draw.choice(["many", "12 layers", [3], {"value": 3}])
        case list():
            wrong = draw.choice([{"first": 1}, 7.5, True])
        case dict():
            wrong = draw.choice([7, "text", [1, 2]])
        case _:
            wrong = draw.choice([["text"], {"text": 1}])
    if path in NOT_WRONG and isinstance(wrong, NOT_WRONG[path]):
        return None
    node[name] = wrong
    return Mutation("wrong type", path, f"{path}={wrong!r}")


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and ("${" in value or value == "???")


# --- out of range -------------------------------------------------------------------------------------------------


def _out_of_range(config: dict[str, Any], draw: random.Random, _: Callable[[str], bool]) -> Mutation | None:
    path = _pick(config, draw, lambda _, value: isinstance(value, int | float) and not isinstance(value, bool))
    node, name = section_of(config, path), path.rpartition(".")[2]
    above = name.endswith(FRACTIONS) and draw.random() < 0.5
    node[name] = abs(node[name]) + 1234.5 if above else -abs(node[name]) - FAR
    return Mutation("out of range", path, f"{path}={node[name]}")


# --- deleted ------------------------------------------------------------------------------------------------------


def _deleted(config: dict[str, Any], draw: random.Random, _: Callable[[str], bool]) -> Mutation | None:
    path = _pick(config, draw, lambda path, _: not path.startswith("exp_manager.") or path.count(".") < 4)
    del section_of(config, path)[path.rpartition(".")[2]]
    return Mutation("deleted", path, f"{path} deleted")


# --- contradictions -----------------------------------------------------------------------------------------------

Change = dict[str, Any]


def _contradictions(model: dict[str, Any]) -> list[Change]:
    """Pairs that exclude each other, by what NeMo, megatron-core and this backend state."""
    every: list[Change] = [
        {"model.global_batch_size": 7, "model.micro_batch_size": 2},
        {"model.optim.lr": 1e-5, "model.optim.sched.min_lr": 1e-3},
        {"trainer.max_steps": 100, "model.optim.sched.warmup_steps": 101},
        {"trainer.precision": "16", "model.megatron_amp_O2": True},
        {"trainer.logger": True, "exp_manager.create_tensorboard_logger": True},
        {"trainer.enable_checkpointing": True, "exp_manager.create_checkpoint_callback": True},
        {"model.tensor_model_parallel_size": 1, "model.sequence_parallel": True},
        {"model.fsdp": True},
        {"model.fp8": True},
        {
            "exp_manager.checkpoint_callback_params.every_n_train_steps": 100,
            "exp_manager.checkpoint_callback_params.every_n_epochs": 1,
        },
        {"exp_manager.checkpoint_callback_params.save_top_k": -5},
        {"exp_manager.log_local_rank_0_only": True, "exp_manager.log_global_rank_0_only": True},
    ]
    if "num_layers" not in model:
        return every
    layers = int(model["num_layers"])
    every += [
        {"model.tensor_model_parallel_size": 5},
        {"model.pipeline_model_parallel_size": layers + 1},
        {"model.activations_checkpoint_granularity": "full", "model.activations_checkpoint_method": None},
        {"model.activations_checkpoint_granularity": "selective", "model.activations_checkpoint_num_layers": 1},
        {"model.activations_checkpoint_granularity": None, "model.activations_checkpoint_method": "uniform"},
        {"model.encoder_seq_length": 64, "model.data.seq_length": 128},
    ]
    if not model.get("mcore_gpt"):
        return every
    return [
        *every,
        {"model.num_attention_heads": 32, "model.num_query_groups": 5},
        {"model.hidden_size": 4097, "model.num_attention_heads": 32},
        {"model.virtual_pipeline_model_parallel_size": 2, "model.pipeline_model_parallel_size": 1},
        {"model.context_parallel_size": 3, "model.encoder_seq_length": 4096},
        {"model.expert_model_parallel_size": 2, "model.num_moe_experts": None},
        {"model.num_moe_experts": 4, "model.moe_router_topk": 5},
        {"model.num_moe_experts": 4, "model.bias": True},
        {"model.mcore_gpt": False},
        {"model.optim.name": "adafactor"},
        {"model.position_embedding_type": "alibi", "model.context_parallel_size": 2},
    ]


def _contradiction(config: dict[str, Any], draw: random.Random, _: Callable[[str], bool]) -> Mutation | None:
    change = draw.choice(_contradictions(config["model"]))
    for path, value in change.items():
        try:
            section_of(config, path)[path.rpartition(".")[2]] = value
        except KeyError:
            return None
    text = ", ".join(f"{path}={value}" for path, value in change.items())
    return Mutation("contradiction", next(iter(change)), text)
