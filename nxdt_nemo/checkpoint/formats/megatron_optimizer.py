"""Optimizer state of Megatron's per-rank files, which has no names: numbers, and a flat buffer.

Room checkpoint/ (leaf). Parameters are in the order of the rank's model state.
  unsharded   state[id], ids counted through the parameter groups; a group has matrices (wd_mult 1) or biases and
              vectors (wd_mult 0), and comes where its first parameter does (megatron.core's _get_param_groups)
  sharded     distrib_optim.pt: buffers of each kind, parameters in reverse, each at a multiple of 64 elements; the
              padding at the end of buckets is left out (megatron.core's _ParamAndGradBuffer)
Experts have an optimizer of their own, the second of a list. May import this room.
Proof: tests/checkpoint/test_fixtures.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nxdt_nemo.checkpoint.boxes import Box, whole
from nxdt_nemo.checkpoint.catalog import Reshaped, Wanted
from nxdt_nemo.checkpoint.dtypes import FLOAT32, Raw
from nxdt_nemo.checkpoint.formats.base import Source, Target
from nxdt_nemo.checkpoint.formats.megatron import FILE, flat, folder_name
from nxdt_nemo.checkpoint.formats.per_rank import compare, in_order, pending
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.io.pickling import Pending, scalar
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Copied, Dialect, Stored, rows_of
from nxdt_nemo.errors import UserError

__all__ = ["DISTRIBUTED", "SHARDED", "Buckets", "buffers_of", "collect", "part_of", "state_of", "unsharded"]

SHARDED = "distrib_optim.pt"
DISTRIBUTED = "distrib_optim"  # the option's value that asks for it
_ALIGN = 64
_FLAT = {"param": "fp32_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def _no_decay(stored: Stored) -> bool:
    return len(stored.shape) == 1 or stored.key.endswith(".bias")


def collect(source: Source, ranks: Mapping[str, Mapping[str, Any]], dialect: Dialect, files: Files) -> None:
    """Put the state of every rank into the source's catalog. ranks: the content of model_optim_rng.pt by folder.

    Raises UserError if it is not there, or not that of the model.
    """
    model, layout = source.model, source.layout
    for name, state in ranks.items():
        folder = source.path / name
        chunks: list[list[Stored]] = []
        pp = 0
        for shard in layout.shards(model.layers, model.experts):
            if folder_name(layout, shard.tp, shard.pp, shard.ep) == name:
                key = f"model{shard.chunk}" if layout.vpp > 1 else "model"
                chunks.append(in_order(rows_of(dialect, model, source.names, shard, layout), dict(flat(state[key]))))
                pp = shard.pp
        if state.get("optimizer") is None:
            raise UserError("has no optimizer state", place=str(folder / FILE), fix="leave out --with-optimizer")
        parts = state["optimizer"] if isinstance(state["optimizer"], list) else [state["optimizer"]]
        sharded = folder / SHARDED
        buffers = torch_zip.read(files(sharded)) if sharded.exists() else None
        for number, part in enumerate(parts):
            mine = [[s for s in chunk if _has(s, number, len(parts))] for chunk in chunks]
            if buffers is not None:
                held = buffers[number] if isinstance(buffers, list) else buffers
                if held is not None:  # the dense parameters' of groups of experts after the first
                    cut = Buckets.of(source.training.args, model, layout, pp, first=False)
                    _sharded(source, mine, held, cut, str(sharded))
            else:
                unsharded(source, [s for chunk in mine for s in chunk], part, str(folder / FILE))


def _has(stored: Stored, number: int, parts: int) -> bool:
    return parts == 1 or stored.row.expert == (number == 1)


def unsharded(source: Source, params: Sequence[Stored], part: Mapping[str, Any], place: str) -> None:
    """Put the state of an optimizer with these parameters, in the order of the model's modules, into the catalog."""
    inner = part.get("optimizer", part)
    groups, state = inner.get("param_groups"), inner.get("state")
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise UserError("its optimizer state has no groups", place=place)
    main = part.get("fp32_from_fp16_params") or part.get("fp32_from_fp16")
    for number, group in enumerate(groups):
        light = group.get("wd_mult", group.get("weight_decay")) == 0
        mine = [stored for stored in params if _no_decay(stored) == light] if len(groups) > 1 else list(params)
        ids = group.get("params", [])
        if len(ids) != len(mine) or group.get("is_decoupled_lr"):
            reason = f"parameter group {number} has {len(ids)} parameters, the model has {len(mine)} for it"
            raise UserError(reason, place=place, fix="its optimizer groups parameters in its own way: leave it out")
        for at, (stored, name) in enumerate(zip(mine, ids, strict=True)):
            kinds = {kind: state.get(name, {}).get(kind) for kind in ("exp_avg", "exp_avg_sq")}
            if main is not None:
                kinds["fp32_param"] = main[number][at]
            for kind, found in kinds.items():
                if not isinstance(found, Extent) or found.shape != stored.shape:
                    said = list(found.shape) if isinstance(found, Extent) else "missing"
                    reason = f"{kind} of {stored.key} is {said}, the parameter is {list(stored.shape)}"
                    raise UserError(reason, place=place, fix="optimizer state and model are of two runs")
                if isinstance(stored.row.how, Copied):
                    compare(source.catalog, kind, stored, found, Path(place))
                source.catalog.add(kind, stored.read, found, whole(found.shape))


class _Slot(NamedTuple):
    stored: Stored
    begin: int


@dataclass(frozen=True)
class Buckets:
    """How a run cuts its buffers, as far as their length depends on it.

    divisor  of a bucket's length; size, of a bucket, None for one
    alone    where in the model a tied embedding has a bucket of its own
    """

    divisor: int = 128
    size: int | None = None
    alone: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: Mapping[str, Any], model: Model, layout: Layout, pp: int, *, first: bool) -> Buckets:
        """Of the run that has these arguments, for stage `pp`, which may be its first (virtual) one."""
        dp = int(args.get("data_parallel_size") or 1)
        high = 2**16 if args.get("ddp_pad_buckets_for_high_nccl_busbw") else 1
        size = args.get("ddp_bucket_size") or max(40_000_000, 1_000_000 * dp)
        return cls(
            math.lcm(dp, 128, high),
            int(size) if first and args.get("overlap_grad_reduce") else None,
            _alone(layout, pp) if model.tied and layout.pp > 1 else (),
        )


def _alone(layout: Layout, pp: int) -> tuple[str, ...]:
    """Where megatron-core marks what a stage has as shared; not the embedding of a T5's decoder, or beside a head."""
    return ("last",) if layout.encoder and (pp or layout.encoder == 1) else ("first", "last")


def _slots(params: Sequence[Stored], buckets: Buckets) -> tuple[list[_Slot], int]:
    """Where each parameter begins in a buffer without its buckets' padding, and the buffer's length."""
    divisor, bucket = buckets.divisor, buckets.size
    slots, at, begin, removed, used = [], 0, 0, 0, False

    def close(end: int) -> int:
        nonlocal begin, removed, used
        padded = -(-end // divisor) * divisor
        removed += padded - end
        begin, used = padded, False
        return padded

    for stored in reversed(params):
        at = -(-at // _ALIGN) * _ALIGN
        embeds = any(part.name == "embedding.word.weight" for part in stored.parts)
        alone = embeds and stored.row.on in buckets.alone
        if alone and used:
            at = close(at)
        slots.append(_Slot(stored, at - removed))
        at += math.prod(stored.shape)
        used = True
        if alone or (bucket is not None and at - begin >= bucket):
            at = close(at)
    return slots, at - removed


def _sharded(
    source: Source, chunks: Sequence[Sequence[Stored]], buffers: Mapping[Any, Any], said: Buckets, place: str
) -> None:
    """said: how the run cut its buffers, but for the buckets' size, which is found here."""
    args = source.training.args
    dp = int(args.get("data_parallel_size") or 1)
    sizes = [None, args.get("ddp_bucket_size"), max(40_000_000, 1_000_000 * dp)]
    for number, params in enumerate(chunks):
        held = buffers.get(number)
        if not isinstance(held, Mapping) or len(held) != 1:
            raise UserError(f"has no buffer {number}, or several dtypes in one", place=place)
        (content,) = held.values()
        length = content.get("numel_unpadded")
        fitting = (_slots(params, replace(said, size=size)) for size in sizes)
        slots = next((slots for slots, end in fitting if end == length), None)
        if slots is None:
            reason = f"buffer {number} has {length} elements, the model's parameters make another number"
            raise UserError(reason, place=place, fix="its buckets are not known: leave out --with-optimizer")
        for name, kind in _FLAT.items():
            flat = content.get(name)
            if not isinstance(flat, Extent) or flat.shape != (length,):
                raise UserError(f"has no {name} of {length} elements", place=place)
            for stored, begin in slots:
                at = Box((begin,), (math.prod(stored.shape),))
                source.catalog.add(kind, stored.read, Reshaped(flat, at, stored.shape), whole(stored.shape))


def state_of(source: Source, target: Target, params: Sequence[Stored]) -> Any:
    """The `optimizer` of a rank with these parameters: of an unsharded optimizer, or what a sharded one has beside."""
    sharded = target.extra.get("optimizer_format") == DISTRIBUTED
    made = [_groups_of(source, part) if sharded else part_of(source, target, part) for part in _halves(params) if part]
    return made[0] if len(made) == 1 else made


def _halves(params: Sequence[Stored]) -> tuple[list[Stored], list[Stored]]:
    """Dense parameters, and those of experts."""
    return [stored for stored in params if not stored.row.expert], [stored for stored in params if stored.row.expert]


def _groups_of(source: Source, params: Sequence[Stored]) -> dict[str, Any]:
    lights = dict.fromkeys(map(_no_decay, params))
    groups = [_hyper(source, light, bool(params[0].row.expert)) for light in lights]
    return {"optimizer": {"param_groups": [{**group, "step": source.training.step or 0} for group in groups]}}


@dataclass(frozen=True)
class _Flat:
    """A buffer: parameters one after the other, zeros between them. Written in parts, since it is a rank's whole."""

    wants: tuple[tuple[int, Wanted], ...]
    length: int

    def pieces(self) -> Iterator[Raw]:
        """Its elements in order."""
        at = 0
        for begin, want in self.wants:
            yield np.zeros(begin - at, FLOAT32.raw)
            yield from want.pieces()
            at = begin + math.prod(want.shape)
        yield np.zeros(self.length - at, FLOAT32.raw)

    def tensor(self) -> Raw:
        """All of it. Not of `pieces`, which may lie in one another's place."""
        made = np.zeros(self.length, FLOAT32.raw)
        for begin, want in self.wants:
            made[begin : begin + math.prod(want.shape)] = want.tensor().reshape(-1)
        return made


def buffers_of(
    source: Source, target: Target, chunks: Sequence[Sequence[Stored]], buckets: Sequence[Buckets], *, dense: bool
) -> Any:
    """What distrib_optim.pt holds of a rank.

    chunks, buckets  of each virtual stage
    dense            with the dense parameters: of several groups of experts the first has them
    """
    halves = [[_halves(chunk)[number] for chunk in chunks] for number in (0, 1)]
    kinds = {name: kind if kind in target.kinds else "model" for name, kind in _FLAT.items()}
    dtype = target.dtype or source.dtype
    gradients = dtype if source.training.args.get("grad_reduce_in_bf16") else FLOAT32

    def buffer(params: Sequence[Stored], cut: Buckets) -> dict[Any, Any]:
        slots, length = _slots(params, cut)
        flat: dict[str, Any] = {}
        for name, kind in kinds.items():
            wants = tuple((slot.begin, source.catalog.want(kind, slot.stored, FLOAT32)) for slot in slots)
            flat[name] = Pending(_Flat(wants, length), FLOAT32, (length,), length * FLOAT32.itemsize)
        return {(dtype, gradients): {**flat, "numel_unpadded": length}}

    def parameter_state(half: Sequence[Sequence[Stored]]) -> dict[Any, Any]:
        each = (buffer(params, cut) for params, cut in zip(half, buckets, strict=True))
        return {"buckets_coalesced": True, **dict(enumerate(each))}

    made = [parameter_state(half) if dense or number else None for number, half in enumerate(halves) if any(half)]
    return made[0] if len(made) == 1 else made


def part_of(source: Source, target: Target, params: Sequence[Stored]) -> dict[str, Any]:
    """The state of one optimizer with these parameters."""
    groups: dict[bool, list[Stored]] = {}
    for stored in params:
        groups.setdefault(_no_decay(stored), []).append(stored)
    state: dict[int, dict[str, Any]] = {}
    made, main = [], []
    for light, mine in groups.items():
        ids = range(len(state), len(state) + len(mine))
        for number, stored in zip(ids, mine, strict=True):
            moments = {kind: pending(source, kind, stored) for kind in ("exp_avg", "exp_avg_sq")}
            state[number] = {"step": scalar(source.training.step or 0), **moments}  # torch adds to each in place
        if "fp32_param" in target.kinds:
            main.append([pending(source, "fp32_param", stored) for stored in mine])
        made.append({**_hyper(source, light, bool(params[0].row.expert)), "params": list(ids)})
    inner = {"state": state, "param_groups": made}
    return {"optimizer": inner, "fp32_from_fp16_params": main} if main else inner


def _hyper(source: Source, light: bool, expert: bool) -> dict[str, Any]:
    """A group's hyper-parameters: those of the source's group with as much weight decay."""
    found = list(_matching(source.training.groups, light, expert))
    base = dict(found[0]) if found else {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    base |= {"wd_mult": 0.0 if light else 1.0, "is_expert_parallel": expert}
    return {"lr_mult": 1.0, "is_decoupled_lr": False, **base}


def _matching(groups: Sequence[dict[str, Any]], light: bool, expert: bool) -> Iterator[dict[str, Any]]:
    for exact in (True, False):
        for group in groups:
            if (group.get("wd_mult", group.get("weight_decay")) == 0) != light:
                continue
            if not exact or bool(group.get("is_expert_parallel")) == expert:
                yield group
    yield from groups
