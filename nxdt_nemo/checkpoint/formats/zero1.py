"""ZeRO-1 as torch_xla's ZeroRedundancyOptimizer saves it (NxD, NNM): each data-parallel rank a slice, by number.

Room checkpoint/ (leaf). Parameter i, counted through the parameter groups, is padded along its first axis to a multiple
of the data-parallel size and cut: base_state[i] has exp_avg, exp_avg_sq and step, sharded_master_weights[i] the
float32 weights, shape_info[i] the shape before padding. May import this room.
Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint.boxes import Box
from nxdt_nemo.checkpoint.dtypes import FLOAT32
from nxdt_nemo.checkpoint.formats.base import Source, Target
from nxdt_nemo.checkpoint.formats.per_rank import pending, stacked
from nxdt_nemo.checkpoint.io.files import Extent
from nxdt_nemo.checkpoint.io.pickling import Pending, scalar
from nxdt_nemo.checkpoint.placement import Stored
from nxdt_nemo.errors import UserError

__all__ = ["collect", "hyper_of", "state_of"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def _is_bias(stored: Stored) -> bool:
    return stored.key.endswith("bias")


def _light(stored: Stored) -> bool:
    return len(stored.shape) == 1 or _is_bias(stored)


def _by_group(params: Sequence[Stored], counts: Sequence[int]) -> list[Stored] | None:
    """Parameters in the order in which groups of these sizes count them; None if no rule makes such groups."""
    if sum(counts) != len(params):
        return None
    used = [count for count in counts if count]
    if len(used) == 1:
        return list(params)
    for rule in (_light, _is_bias):
        halves = [[s for s in params if not rule(s)], [s for s in params if rule(s)]]
        for order in permutations(halves):
            if [len(half) for half in order] == used:
                return [stored for half in order for stored in half]
    return None


def collect(source: Source, params: Sequence[Stored], slices: Sequence[tuple[Path, Any]]) -> None:
    """Put the state of one model-parallel rank into the catalog.

    params  in the order of the model's modules; slices in the order of data-parallel ranks
    Raises UserError if it is not the state of these parameters.
    """
    place = str(slices[0][0])
    first = _part(slices[0])
    if any(place is not None for _, place in stacked(params)):
        raise UserError("has ZeRO-1 state of experts", place=place, fix="leave out --with-optimizer")
    groups = first.get("param_groups") or []
    counts = [len(group.get("params", ())) for group in groups]
    ordered = _by_group(params, counts)
    if ordered is None:
        reason = f"its groups have {counts} parameters, the model has {len(params)} on this rank"
        raise UserError(reason, place=place, fix="state and model are of two runs: leave out --with-optimizer")
    numbers = [number for group in groups for number in group["params"]]
    shapes = first.get("shape_info") or {}
    for number, stored in zip(numbers, ordered, strict=True):
        if tuple(shapes.get(number, stored.shape)) != stored.shape:
            reason = f"parameter {number} is {list(shapes[number])}, {stored.key} is {list(stored.shape)}"
            raise UserError(reason, place=place, fix="state and model are of two runs: leave out --with-optimizer")
        for at, held in enumerate(slices):
            _add(source, stored, number, at, len(slices), held)
    steps = [state.get("step") for state in (first.get("base_state") or {}).values()]
    steps = [step.number() if isinstance(step, Extent) else step for step in steps if step is not None]
    source.training.step = max(steps) if steps else source.training.step
    source.training.groups = [{k: v for k, v in group.items() if k != "params"} for group in groups]


def _part(held: tuple[Path, Any]) -> Mapping[str, Any]:
    path, state = held
    state = state[0] if isinstance(state, list) and len(state) == 1 else state
    if not isinstance(state, Mapping) or not isinstance(state.get("base_state"), Mapping):
        raise UserError("holds no ZeRO-1 state", place=str(path), fix="leave out --with-optimizer")
    return state


def _add(source: Source, stored: Stored, number: int, at: int, ranks: int, held: tuple[Path, Any]) -> None:
    part = _part(held)
    rows = stored.shape[0]
    each = -(-rows // ranks)
    begin, mine = at * each, min(each, rows - at * each)
    kinds = {kind: part["base_state"].get(number, {}).get(kind) for kind in _MOMENTS}
    if "sharded_master_weights" in part:
        kinds["fp32_param"] = part["sharded_master_weights"].get(number)
    for kind, found in kinds.items():
        if not isinstance(found, Extent) or found.shape != (each, *stored.shape[1:]):
            said = list(found.shape) if isinstance(found, Extent) else "missing"
            reason = f"{kind} of {stored.key} is {said}, 1/{ranks} of {list(stored.shape)} is {each} rows"
            raise UserError(reason, place=str(held[0]), fix="a data-parallel rank's file is missing, or of another run")
        if mine > 0:
            start = (begin, *(0 for _ in stored.shape[1:]))
            source.catalog.add(kind, stored.parts, found, Box(start, (mine, *stored.shape[1:])))


def state_of(
    source: Source, target: Target, params: Sequence[Stored], rank: int, ranks: int, norms: bool = True
) -> dict[str, Any]:
    """What data-parallel rank `rank` of `ranks` saves of these parameters.

    norms  they are in the second group, without weight decay, as biases are
    """
    light = _light if norms else _is_bias
    ordered = [s for s in params if not light(s)] + [s for s in params if light(s)]
    if any(place is not None for _, place in stacked(params)):
        raise UserError("ZeRO-1 state of experts is not written", place="--with-optimizer", fix="leave it out")
    base: dict[int, Any] = {}
    master: dict[int, Pending] = {}
    for number, stored in enumerate(ordered):
        mine = _slice(stored, rank, ranks)
        step = scalar(source.training.step or 0)  # torch adds to each in place
        base[number] = {"step": step, **{kind: pending(source, kind, mine) for kind in _MOMENTS}}
        kind = "fp32_param" if "fp32_param" in source.catalog.kinds() else "model"
        master[number] = pending(source, kind, mine, FLOAT32)
    heavy = sum(not light(stored) for stored in params)
    ids = (list(range(heavy)), list(range(heavy, len(ordered))))
    return {
        "state": {},
        "param_groups": [
            {**hyper_of(source, second), "params": numbers} for second, numbers in zip((False, True), ids, strict=True)
        ],
        "base_state": base,
        "shape_info": {number: list(stored.shape) for number, stored in enumerate(ordered)},
        "sharded_master_weights": master,
    }


def _slice(stored: Stored, rank: int, ranks: int) -> Stored:
    """Its rows of one data-parallel rank; rows after the end are padding, zeros."""
    each = -(-stored.shape[0] // ranks)
    begin = rank * each
    rows = max(0, min(each, stored.shape[0] - begin))
    if not rows:
        return replace(stored, shape=(each, *stored.shape[1:]), parts=())
    start = (begin, *(0 for _ in stored.shape[1:]))
    cut = stored.cut(Box(start, (rows, *stored.shape[1:])))
    return replace(cut, shape=(each, *stored.shape[1:]))


def hyper_of(source: Source, light: bool) -> dict[str, Any]:
    """A group's hyper-parameters: those of the source's group with as much weight decay."""
    groups = source.training.groups
    same = [g for g in groups if (g.get("wd_mult", g.get("weight_decay")) == 0) == light]
    found = dict((same or groups or [{"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}])[0])
    return {key: value for key, value in found.items() if key in _HYPER}


_HYPER = frozenset("lr betas eps weight_decay initial_lr bias_correction amsgrad maximize foreach capturable".split())
