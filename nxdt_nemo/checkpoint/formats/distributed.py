"""Distributed checkpoints of megatron-core, whichever container: arrays of the whole model in chunks.

Room checkpoint/ (leaf). Keys are dialects/megatron_core.py's. Optimizer state by name is of one of two shapes: the
parameter's (`model space`), or, with Megatron's distributed optimizer, tile by tile flattened
(`fully_sharded_model_space`): [layers, tiles along each axis, elements of a tile].
May import this room. Proof: tests/checkpoint/test_fixtures.py.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint.boxes import Box, flat_boxes
from nxdt_nemo.checkpoint.catalog import Array, Catalog, Reshaped
from nxdt_nemo.checkpoint.dialects.megatron_args import layout_of
from nxdt_nemo.checkpoint.dialects.megatron_core import DISTRIBUTED, PER_RANK_TE
from nxdt_nemo.checkpoint.dtypes import DType
from nxdt_nemo.checkpoint.formats import megatron
from nxdt_nemo.checkpoint.formats.base import Options, Source
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Stored, rows_of
from nxdt_nemo.checkpoint.tensors import KINDS
from nxdt_nemo.errors import UserError

__all__ = ["Item", "build"]

_KINDS = KINDS[1:]
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)")
# Held beside the tensors, and nothing that a model needs.
_ASIDE = re.compile(
    r".*_extra_state(/|$).*|rng_state(/|$).*|rerun_state_machine_state(/|$).*|(chained_\d+\.)?optimizer\..*"
)
_LOCAL_LAYER = re.compile(r"(de|en)coder\.layers\.\d+\.")
_ROOTS = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight")


@dataclass
class Item:
    """An array of the whole model, and its chunks."""

    shape: tuple[int, ...]
    dtype: DType
    chunks: list[tuple[Box, Array]] = field(default_factory=list)

    def by_index(self, lead: int) -> Mapping[tuple[int, ...], list[tuple[Box, Array]]]:
        """Chunks by each place in the leading axes that they cover."""
        found: dict[tuple[int, ...], list[tuple[Box, Array]]] = defaultdict(list)
        for box, array in self.chunks:
            ranges = (range(s, s + n) for s, n in zip(box.start[:lead], box.size[:lead], strict=True))
            for index in product(*ranges):
                found[index].append((box, array))
        return found


def build(
    name: str, path: Path, items: Mapping[str, Item], common: Mapping[str, Any], options: Options, files: list[Path]
) -> Source:
    """A Source of a container's arrays and its common.pt. Raises UserError for what is missing or contradictory."""
    place = str(path)
    prefix = _prefix(items, place)
    training = megatron.training_of(common, path)
    model = megatron.model_of(training.args, options, place)
    if options.config is None:
        model = megatron.by_tensors(model, {key.removeprefix(prefix): item.shape for key, item in items.items()})
    model = _believe(model, items, prefix, options, place)
    family = megatron.family_of(model, place)
    model = model.with_(family=family.name).check(place)
    catalog, claimed = Catalog(), set()
    kinds = ("model", *_KINDS) if options.optimizer else ("model",)
    states = _states(items)
    indexed: dict[str, Mapping[tuple[int, ...], list[tuple[Box, Array]]]] = {}
    for stored in _all(model, family.names(model), any(_LOCAL_LAYER.match(key.removeprefix(prefix)) for key in items)):
        for kind in kinds:
            key, item = _find(items, states, kind, prefix, stored)
            if item is None:
                if kind == "model":
                    raise UserError(
                        f"{prefix}{stored.key} is missing", place=place, fix="the checkpoint is not complete"
                    )
                continue
            claimed.add(key)
            if key not in indexed:
                indexed[key] = item.by_index(len(stored.lead))
            _add(catalog, kind, stored, key, item, indexed[key].get(stored.index, []), place)
    for key in items:
        if key not in claimed and not _ASIDE.fullmatch(key):
            raise UserError(f"{key} is not a tensor of {family.name}", place=place, fix="name the right --family")
    layout, assets = layout_of(training.args), megatron.assets_of(path)
    return Source(name, path, family, model, catalog, layout, training, files, assets, detail={"prefix": prefix})


def _prefix(items: Mapping[str, Item], place: str) -> str:
    """What stands before megatron-core's names: nothing, or `model.` or `module.` in NeMo's."""
    for root in _ROOTS:
        found = [key.removesuffix(root) for key in items if key.endswith(root) and not key.startswith(("opt", "chain"))]
        if found:
            return min(found, key=len)
    raise UserError(f"has no {_ROOTS[0]}", place=place, fix="it is no GPT model of megatron-core, or not complete")


def _believe(model: Model, items: Mapping[str, Item], prefix: str, options: Options, place: str) -> Model:
    """The model with what the tensors say of its vocabulary, which arguments and padding leave open."""
    item = items.get(prefix + _ROOTS[0])
    rows = item.shape[0] if item else model.padded_vocab or model.vocab
    vocab = options.vocab or model.vocab
    if options.config is None and options.vocab is None and model.padded_vocab not in (0, rows):
        reason = f"padded_vocab_size is {model.padded_vocab} in its arguments, the embedding has {rows} rows"
        raise UserError(reason, place=place, fix="say what the vocabulary is: --vocab-size")
    if vocab > rows:
        raise UserError(
            f"a vocabulary of {vocab}, but {rows} rows in the embedding", place=place, fix="give --vocab-size"
        )
    return model.with_(vocab=vocab, padded_vocab=rows)


def _all(model: Model, names: frozenset[str], unstacked: bool) -> Iterator[Stored]:
    layout = Layout()
    shard = layout.shard(model.layers, 0, 0, 0, 0, range(model.experts))
    return rows_of(PER_RANK_TE if unstacked else DISTRIBUTED, model, names, shard, layout, local=False)


def _states(items: Mapping[str, Item]) -> dict[tuple[str, str], str]:
    """The key of each kind of state of each tensor."""
    found = {}
    for key in items:
        if match := _STATE.fullmatch(key):
            kind = "fp32_param" if match[1] == "param" else match[1]
            found[kind, match[2]] = key
    return found


def _find(
    items: Mapping[str, Item], states: Mapping[tuple[str, str], str], kind: str, prefix: str, stored: Stored
) -> tuple[str, Item | None]:
    for name in (stored.key, *stored.also):
        key = prefix + name if kind == "model" else states.get((kind, prefix + name), "")
        if key in items:
            return key, items[key]
    return "", None


def _add(
    catalog: Catalog, kind: str, stored: Stored, key: str, item: Item, chunks: list[tuple[Box, Array]], place: str
) -> None:
    lead, shape = len(stored.lead), stored.lead + stored.shape
    if item.shape == shape:
        for box, array in chunks:
            index = tuple(at - start for at, start in zip(stored.index, box.start[:lead], strict=True))
            catalog.add(kind, stored.parts, array, Box(box.start[lead:], box.size[lead:]), index)
        return
    counts = item.shape[lead:-1]
    if kind == "model" or len(item.shape) != len(shape) + 1 or math.prod(item.shape) != math.prod(shape):
        reason = f"{key} is {list(item.shape)}, the model makes it {list(shape)}"
        raise UserError(reason, place=place, fix="arguments and tensors are of two models")
    tile = tuple(n // c for n, c in zip(stored.shape, counts, strict=True))
    for box, array in chunks:
        _add_tiles(catalog, kind, stored, tile, box, array, lead)


def _add_tiles(
    catalog: Catalog, kind: str, stored: Stored, tile: tuple[int, ...], box: Box, array: Array, lead: int
) -> None:
    """A chunk of flattened tiles: a run of the elements of one tile is up to a few boxes."""
    index = tuple(at - start for at, start in zip(stored.index, box.start[:lead], strict=True))
    begin, size = box.start[-1], box.size[-1]
    for place in product(*(range(n) for n in box.size[lead:-1])):
        corner = tuple((s + p) * n for s, p, n in zip(box.start[lead:-1], place, tile, strict=True))
        for run, offset in flat_boxes(tile, begin, begin + size):
            at = Box((*index, *place, offset), (1,) * (lead + len(place)) + (run.volume,))
            origin = run.moved((0,) * len(tile), corner)
            catalog.add(kind, stored.parts, Reshaped(array, at, run.size), origin)
