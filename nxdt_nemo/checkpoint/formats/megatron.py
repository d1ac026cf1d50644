"""What Megatron's formats share: the folder of an iteration, arguments, how far training is.

Room checkpoint/ (leaf). As megatron/training/checkpointing.py (core_v0.13.1) has it. May import this room.
Proof: tests/checkpoint/test_fixtures.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint import families
from nxdt_nemo.checkpoint.dialects import megatron_args
from nxdt_nemo.checkpoint.dtypes import DType
from nxdt_nemo.checkpoint.families import Family
from nxdt_nemo.checkpoint.formats import hf
from nxdt_nemo.checkpoint.formats.base import Options, Output, Source, Training, constant
from nxdt_nemo.checkpoint.io.files import Extent
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.errors import UserError

__all__ = [
    "FAMILY",
    "FILE",
    "TRACKER",
    "args_for",
    "asset_outputs",
    "assets_of",
    "by_tensors",
    "flat",
    "folder_name",
    "folder_of",
    "groups_of",
    "iteration_name",
    "model_of",
    "training_of",
]

FILE, ASSETS = "model_optim_rng.pt", "hf"
RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
FAMILY = "nxdt_family"
_FOLDER = re.compile(r"iter_(\d{7,})|release")


def folder_of(path: Path, step: int | None) -> Path:
    """The folder of one iteration: the path itself, or the one that the tracker or `step` names.

    Raises UserError for a tracker that names no folder, and for folders without a tracker that are not one.
    """
    tracker = path / TRACKER
    if step is not None and not _FOLDER.fullmatch(path.name):
        found = path / iteration_name(step)
        if not found.is_dir():
            raise UserError(f"has no iteration {step}", place=str(path), fix=f"there are {_there(path)}")
        return found
    if tracker.is_file():
        said = tracker.read_text().strip()
        if said != "release" and not said.isdigit():
            raise UserError(
                f"holds {said[:40]!r}, no iteration", place=str(tracker), fix="write its number, or release"
            )
        found = path / ("release" if said == "release" else iteration_name(int(said)))
        if not found.is_dir():
            raise UserError(
                f"names {found.name}, which is not there", place=str(tracker), fix=f"there are {_there(path)}"
            )
        return found
    inner = [at for at in path.iterdir() if at.is_dir() and _FOLDER.fullmatch(at.name)] if path.is_dir() else []
    if len(inner) > 1:
        raise UserError(f"has {len(inner)} iterations and no {TRACKER}", place=str(path), fix="name one: --step")
    return inner[0] if inner else path


def iteration_name(step: int | None) -> str:
    """iter_0000042; `release` for weights that are no iteration's."""
    return RELEASE if step is None else f"iter_{step:07d}"


def _there(path: Path) -> str:
    return ", ".join(sorted(at.name for at in path.iterdir() if _FOLDER.fullmatch(at.name))) or "none"


def model_of(args: Mapping[str, Any], options: Options, place: str) -> Model:
    """The Model that a source's arguments, or the configuration given instead, say. Its family may be ""."""
    if options.config is not None:
        return hf.model_of(options.config, options.family)[1]
    if not args:
        raise UserError(
            "does not say what the model is", place=place, fix="give the model's: --model-config config.json"
        )
    model = megatron_args.from_args(args, place)
    return model.with_(family=options.family or str(args.get(FAMILY) or ""), extra=dict(args.get("nxdt_extra") or {}))


_ENCODER, _DECODER = (re.compile(rf"{name}\.layers\.(\d+)\.") for name in ("encoder", "decoder"))
_RELATIVE = "encoder_relative_pos_emb.relative_attention_bias.weight"


def by_tensors(model: Model, shapes: Mapping[str, tuple[int, ...]], layout: Layout | None = None) -> Model:
    """The model with what only its tensors say: Megatron's arguments are the same for a GPT, a BERT and a T5.

    shapes  of all arrays, by megatron-core's or older names; of a stacked one the first axis counts layers
    layout  of the ranks, if each numbers its own layers
    """
    types = [shape[0] for key, shape in shapes.items() if key.endswith("tokentype_embeddings.weight")]
    if types:
        model = model.with_(token_types=types[0], pooled=any("binary_head." in key for key in shapes))
    if not any(".cross_attention." in key for key in shapes):
        return model
    relative = shapes.get(_RELATIVE, (0,))[0]
    encoders, decoders = (layout.encoder, layout.pp - layout.encoder) if layout and layout.encoder else (1, 1)
    return model.with_(
        layers=_count(_ENCODER, shapes, "encoder") * encoders or model.layers,
        decoder_layers=_count(_DECODER, shapes, "decoder") * decoders,
        relative_buckets=relative,
        learned_positions=model.learned_positions and not relative,
    )


def _count(numbered: re.Pattern[str], shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Layers of a T5's encoder or decoder."""
    stacked = shapes.get(f"{name}.layers.self_attention.linear_proj.weight")
    if stacked:
        return stacked[0]
    return 1 + max((int(match[1]) for key in shapes if (match := numbered.match(key))), default=-1)


def family_of(model: Model, place: str) -> Family:
    """The family that the model names, or that has its features."""
    return families.by_name(model.family) if model.family else families.of_model(model, place)


def training_of(common: Mapping[str, Any], folder: Path) -> Training:
    """How far training is, from common.pt or model_optim_rng.pt; a folder `release` is of no iteration."""
    args = common.get("args")
    known = vars(args) if isinstance(args, argparse.Namespace) else {}
    groups, step = groups_of(common.get("optimizer"))
    iteration = common.get("iteration") if folder.name != RELEASE else None
    consumed = known.get("consumed_train_samples")
    scheduler = common.get("opt_param_scheduler")
    return Training(
        iteration=iteration if isinstance(iteration, int) else None,
        consumed=consumed if isinstance(consumed, int) else None,
        step=step,
        groups=groups,
        args=known,
        scheduler=dict(scheduler) if isinstance(scheduler, dict) else {},
    )


def groups_of(optimizer: Any) -> tuple[list[dict[str, Any]], float | None]:
    """Parameter groups and step of an optimizer's state in whichever of Megatron's forms."""
    groups: list[dict[str, Any]] = []
    steps: list[float] = []

    def look(value: Any, key: Any = "") -> None:
        if key == "param_groups" and isinstance(value, list):
            groups.extend({k: v for k, v in group.items() if k != "params"} for group in value)
            steps.extend(float(group["step"]) for group in value if isinstance(group.get("step"), (int, float)))
        elif key in ("step", "common_step") and isinstance(value, Extent) and not value.shape:
            steps.append(value.number())
        elif isinstance(value, dict):
            for name, inner in value.items():
                look(inner, name)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                look(inner)

    look(optimizer)
    return groups, max(steps) if steps else None


def assets_of(folder: Path) -> dict[str, Path]:
    """A tokenizer's files that a conversion carried along, beside the iteration's folder."""
    for at in (folder / ASSETS, folder.parent / ASSETS):
        if at.is_dir():
            return {file.name: file for file in sorted(at.iterdir()) if file.is_file()}
    return {}


def asset_outputs(source: Source) -> Iterator[Output]:
    """These files, to be written."""
    for name, asset in source.assets.items():
        yield constant(f"{ASSETS}/{name}", asset.read_bytes())


def args_for(source: Source, model: Model, layout: Layout, dtype: DType) -> argparse.Namespace:
    """The Namespace to write: the source's own arguments, with what the model and the layout now are."""
    kept = {key: value for key, value in source.training.args.items() if not _is_tensor(value)}
    said = megatron_args.to_args(model, layout, dtype) | {FAMILY: source.family.name, "nxdt_extra": dict(model.extra)}
    if source.training.consumed is not None:
        said["consumed_train_samples"] = source.training.consumed
    if kept:  # Megatron's own names for what it has are left as they are
        said = {key: value for key, value in said.items() if key in kept or key.startswith("nxdt_") or key in _ALWAYS}
        said["vocab_size"] = kept.get("vocab_size")
    return argparse.Namespace(**(_DEFAULTS | kept | said))


_ALWAYS = frozenset(megatron_args.layout_args(Layout()))
# Read by load_checkpoint without a default.
_DEFAULTS: dict[str, Any] = {
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "tokenizer_type": "HuggingFaceTokenizer",
    "make_vocab_size_divisible_by": 128,
    "use_distributed_optimizer": False,
    "ckpt_fully_parallel_save": False,
}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Extent)


def folder_name(layout: Layout, tp: int, pp: int, ep: int) -> str:
    """mp_rank_00, _000 for a stage if there are several, _000 for a group of experts likewise."""
    name = f"mp_rank_{tp:02d}"
    name += f"_{pp:03d}" if layout.pp > 1 else ""
    return name + (f"_{ep:03d}" if layout.ep > 1 else "")


def flat(state: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """A nested state with keys joined by dots."""
    for key, value in state.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        else:
            yield name, value
