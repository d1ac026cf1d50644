"""Model families, one file each: which logical tensors they have, how Hugging Face stores them, its config.json.

Room checkpoint/ (leaf). May import this room. A file here exports FAMILY; docs/checkpoint_formats.md shows how one is
added. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from nxdt_nemo.checkpoint.families.family import Family
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.errors import UserError

__all__ = ["NAMES", "Family", "by_name", "of_config", "of_model"]

# Those that a Megatron checkpoint is tried against, in this order: the first whose features are the model's has it.
NAMES = ("t5", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "bert", "gpt2")


def by_name(name: str) -> Family:
    """Raises UserError with the names there are."""
    if name not in NAMES:
        raise UserError(f"there is no family {name}", place="--family", fix=f"use one of {', '.join(NAMES)}")
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    return family


def of_config(config: Mapping[str, Any], place: str) -> Family:
    """The family of a Hugging Face config.json."""
    kind = config.get("model_type")
    for name in NAMES:
        if kind in by_name(name).model_types:
            return by_name(name)
    known = ", ".join(kind for name in NAMES for kind in by_name(name).model_types)
    raise UserError(f"model_type {kind!r} is not known", place=place, fix=f"known are {known}")


def of_model(model: Model, place: str) -> Family:
    """The family that has the model's features, for checkpoints that do not name one."""
    for name in NAMES:
        if by_name(name).is_it(model):
            return by_name(name)
    raise UserError("no family has this model's features", place=place, fix="name one: --family llama")
