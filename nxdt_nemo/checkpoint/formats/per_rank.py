"""What formats with a file for each rank share: finding the layout in tensors, collecting, NxD's and NNM's xser.

Room checkpoint/ (leaf). xser (torch_xla's serialization): the file holds references instead of tensors, which are
files of their own in FILE.tensors/. May import this room. Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nxdt_nemo.checkpoint.boxes import whole
from nxdt_nemo.checkpoint.catalog import Catalog, Wanted
from nxdt_nemo.checkpoint.dtypes import BY_NAME, DType, Raw, cast, same
from nxdt_nemo.checkpoint.formats.base import Options, Output, Source
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.io.pickling import Pending, Size
from nxdt_nemo.checkpoint.io.unpickle import Inert
from nxdt_nemo.checkpoint.layout import Layout, Shard
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Dialect, Stored, rows_of
from nxdt_nemo.checkpoint.tensors import Kind
from nxdt_nemo.errors import UserError

__all__ = [
    "Held",
    "Reference",
    "arrays_of",
    "believe",
    "check_grid",
    "collect",
    "compare",
    "in_order",
    "is_reference",
    "of_layers",
    "once",
    "pending",
    "read",
    "read_only",
    "stacked",
    "xser",
]

_NOTHING = re.compile(
    r".*(_extra_state|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|\.attention_mask|untrained_buffer_names)"
)
_DRIFT = 2**-6  # of the largest element: two bits of bfloat16
_COMPARED = 1 << 24  # bytes of a copy that are compared with the original; larger ones are not
_WIDE = BY_NAME["float64"]
_MAKES = {"configuration": "the configuration makes", "arguments": "its arguments make"}
_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.")


@dataclass(frozen=True)
class Held:
    """One model, or virtual stage, in a rank's file: arrays by key, the container's prefix taken off."""

    path: Path
    arrays: Mapping[str, Any]


def read(path: Path, files: Files) -> Any:
    """What a file holds, with Extents for its tensors, also where these are files of their own."""
    return read_only(path, torch_zip.read(files(path)), files)


def read_only(path: Path, value: Any, files: Files) -> Any:
    """A part of what a file holds, its references replaced by the tensors' Extents."""
    folder = path.with_name(path.name + ".tensors")
    found: dict[int, Extent] = {}

    def resolved(reference: Inert) -> Any:
        number = reference.get("tid", reference.arguments[0] if reference.arguments else None)
        if not isinstance(number, int) or number < 0:
            raise UserError(f"refers to tensor {number!r}", place=str(path), fix="the file is damaged")
        if number not in found:
            at = folder / f"tensor_{number}.pt"
            if not folder.is_dir() or not at.exists():
                reason = f"refers to {folder.name}/{at.name}, which is not there"
                fix = "copy it too; if only the optimizer's master weights were saved, say --with-optimizer"
                raise UserError(reason, place=str(path), fix=fix)
            tensor = torch_zip.read(files(at))
            if not isinstance(tensor, Extent):
                raise UserError("is no tensor", place=str(at))
            shape, dtype = reference.get("shape"), reference.get("dtype")
            if (shape is not None and tuple(shape) != tensor.shape) or dtype not in (None, tensor.dtype):
                said = f"{list(shape or ())} {dtype}"
                raise UserError(f"is {list(tensor.shape)} {tensor.dtype}, {path.name} makes it {said}", place=str(at))
            found[number] = tensor
        return found[number]

    return _walked(value, resolved)


def is_reference(value: Any) -> bool:
    """True for xser's TensorReference, torch_xla's or NNM's."""
    return isinstance(value, Inert) and value.name.rpartition(".")[2] == "TensorReference"


def _walked(value: Any, resolved: Callable[[Inert], Any]) -> Any:
    if is_reference(value):
        return resolved(value)
    if isinstance(value, dict):
        return {key: _walked(item, resolved) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walked(item, resolved) for item in value]
    return value


def of_layers(arrays: Mapping[str, Any]) -> list[int]:
    """The numbers of the layers that a file has, as its keys count them."""
    found = {int(match[2]) for key in arrays if (match := _LAYER.match(key)) and not _NOTHING.fullmatch(key)}
    return sorted(found)


def check_grid(folder: Path, wanted: Iterable[str], have: Iterable[str], layout: Layout, *, by: str = "") -> None:
    """Raises UserError for missing and for further ranks. by: who says the layout, for the error."""
    wanted, have = set(wanted), set(have)
    if missing := sorted(wanted - have):
        reason = f"{len(missing)} of the {len(wanted)} ranks of {layout} are missing: {', '.join(missing[:4])}"
        raise UserError(reason, place=str(folder), fix="copy them from the cluster's storage")
    if further := sorted(have - wanted):
        reason = f"{', '.join(further[:4])}: no rank of {layout}" + (f", which {by} say" if by else "")
        raise UserError(reason, place=str(folder), fix="remove what an older run left there")


def believe(model: Model, first: Held, key: str, tp: int, options: Options) -> Model:
    """The model with the vocabulary that the embedding has."""
    found = first.arrays.get(key)
    if not isinstance(found, Extent) or len(found.shape) != 2:
        raise UserError(f"has no {key}", place=str(first.path), fix="it is not the first stage's file, or no GPT's")
    if found.shape[1] != model.hidden:
        reason = f"{key} is {list(found.shape)}, the configuration says hidden size {model.hidden}"
        raise UserError(reason, place=str(first.path), fix="use the configuration that belongs to the weights")
    rows = found.shape[0] * tp
    vocab = options.vocab or min(model.vocab or rows, rows)
    if options.vocab is None and model.vocab > rows:
        reason = f"the configuration says {model.vocab} tokens, the embedding has {rows} rows on {tp} ranks"
        raise UserError(reason, place=str(first.path), fix="say what the vocabulary is: --vocab-size")
    if vocab > rows:
        raise UserError(f"a vocabulary of {vocab} for {rows} rows", place=str(first.path), fix="correct --vocab-size")
    return model.with_(vocab=vocab, padded_vocab=rows)


def collect(
    source: Source,
    dialect: Dialect,
    shards: Iterable[tuple[Shard, Held]],
    *,
    local: bool,
    expert_ranks: bool = False,
    by: Literal["configuration", "arguments"] = "configuration",
    hint: str = "",
) -> None:
    """Put the tensors of every rank into the catalog; compare what is there more than once.

    local         keys count a rank's own layers from 0
    expert_ranks  ranks of experts other than the first may lack what is not an expert's
    by            what the model is known by, for errors
    hint          what else may be wrong where copies differ
    Raises UserError for a missing tensor, one of another shape, one that is not the model's, and copies that differ.
    """
    drifted: dict[str, float] = {}
    dtypes: dict[str, tuple[DType, Path]] = {}
    for shard, held in shards:
        claimed = set()
        for stored, place in stacked(rows_of(dialect, source.model, source.names, shard, source.layout, local=local)):
            key = next((name for name in (stored.key, *stored.also) if name in held.arrays), "")
            found = held.arrays.get(key)
            if found is None and expert_ranks and shard.ep and not stored.row.expert:
                continue
            if not isinstance(found, Extent):
                raise UserError(f"{stored.key} is missing", place=str(held.path), fix="the file is not complete")
            lead = () if place is None else (place,)
            experts = () if place is None else (len(shard.experts),)
            if found.shape != (*experts, *stored.shape):
                reason = f"{key} is {list(found.shape)}, {_MAKES[by]} it {[*experts, *stored.shape]}"
                raise UserError(reason, place=str(held.path), fix=f"{by} and tensors are of two models")
            claimed.add(key)
            dtype, first = dtypes.setdefault(stored.parts[0].name, (found.dtype, held.path))
            if found.dtype != dtype:
                reason = f"{key} is {found.dtype}, and {dtype} in {first}"
                raise UserError(reason, place=str(held.path), fix="files of two runs are mixed")
            if place is None and (off := compare(source.catalog, "model", stored, found, held.path, hint)):
                drifted[key] = max(off, drifted.get(key, 0.0))
            source.catalog.add("model", stored.read, found, whole(stored.shape), lead)
        left = [key for key, value in held.arrays.items() if key not in claimed and isinstance(value, Extent)]
        if unknown := [key for key in left if not _NOTHING.fullmatch(key)]:
            reason = f"{unknown[0]} is not a tensor of {source.family.name}"
            raise UserError(reason, place=str(held.path), fix="name the right --family")
    if drifted:
        said = f"{len(drifted)} tensors that several ranks have differ in the last bits"
        source.notes.append(f"{said}, {max(drifted.values()):.1e} of the largest element: the first rank's are taken")
    several = sorted({str(dtype) for dtype, _ in dtypes.values()})
    if len(several) > 1:
        source.notes.append("weights are of several dtypes: " + ", ".join(several))


def stacked(found: Iterable[Stored]) -> Iterator[tuple[Stored, int | None]]:
    """Each array with its place among those that share its key: experts that are rows of one; None for the others."""
    counts: dict[str, int] = {}
    for stored in found:
        if stored.row.expert and "{e}" not in stored.row.key:
            yield stored, counts.setdefault(stored.key, 0)
            counts[stored.key] += 1
        else:
            yield stored, None


def compare(catalog: Catalog, kind: Kind, stored: Stored, found: Extent, path: Path, hint: str = "") -> float:
    """How much a tensor differs from copies that other ranks have, in the largest element of either.

    Ranks' copies drift apart in the last bit where their gradients are summed in another order. Raises UserError for
    more than that.
    """
    worst = 0.0
    for part in stored.read:
        for block in catalog.blocks(kind, part.name, part.box):
            if block.box != part.box or found.nbytes > _COMPARED:
                continue
            theirs, mine = block.read(part.box), found.read(part.at)
            mine = mine.T if part.turned else mine
            if block.array.dtype == found.dtype and same(theirs, mine):
                continue
            theirs, mine = cast(theirs, block.array.dtype, _WIDE), cast(mine, found.dtype, _WIDE)
            largest = float(max(np.abs(theirs).max(), np.abs(mine).max()))
            off = float(np.abs(theirs - mine).max())
            off = off and off / largest
            if not off <= _DRIFT:
                what = stored.key if kind == "model" else f"{kind} of {stored.key}"
                reason = f"{what} differs from its copy in {block.array.place} by {off:.0%} of the largest"
                raise UserError(reason, place=str(path), fix=f"files of two runs are mixed{hint}")
            worst = max(worst, off)
    return worst


def in_order(found: Iterable[Stored], arrays: Mapping[str, Any]) -> list[Stored]:
    """A rank's arrays in the order of its file, by which optimizers number them."""
    by_key = {key: stored for stored in found for key in (stored.key, *stored.also)}
    return once(by_key[key] for key, value in arrays.items() if key in by_key and isinstance(value, Extent))


def once(found: Iterable[Stored]) -> list[Stored]:
    """Each parameter by the first of its names: T5Model knows two modules by two."""
    parts: dict[Any, Stored] = {}
    for stored in found:
        parts.setdefault(stored.parts, stored)
    return list(parts.values())


def pending(source: Source, kind: str, stored: Stored, dtype: DType | None = None) -> Pending:
    """An array to write."""
    return Pending.of(source.catalog.want(kind, stored, dtype))


@dataclass(frozen=True)
class _Stack:
    """The arrays of a rank's experts, one above the other."""

    wants: tuple[Wanted, ...]

    def tensor(self) -> Raw:
        return np.stack([want.tensor() for want in self.wants])


def arrays_of(source: Source, kind: str, found: Sequence[Stored], dtype: DType | None = None) -> dict[str, Pending]:
    """The arrays of a rank by key; those of experts that share one as one."""
    made: dict[str, Pending] = {}
    shared: dict[str, list[Wanted]] = {}
    for stored, place in stacked(found):
        if place is None:
            made[stored.key] = pending(source, kind, stored, dtype)
        else:
            wants = shared.setdefault(stored.key, [])
            wants.append(source.catalog.want(kind, stored, dtype))
            want = wants[0]
            made[stored.key] = Pending(
                _Stack(tuple(wants)), want.dtype, (len(wants), *want.shape), want.nbytes * len(wants)
            )
    return made


@dataclass(frozen=True)
class Reference:
    """xser's reference to a tensor: of torch_xla (NxD) or of NNM, which writes shape and dtype too."""

    module: str
    full: bool = False

    def of(self, number: int, pending: Pending) -> Inert:
        """The object to pickle."""
        kind = type("TensorReference", (Inert,), {"module": self.module, "name": "TensorReference"})
        shape = Size(pending.shape)
        made: Inert = kind(number, shape, pending.dtype) if self.full else kind(number)
        state: dict[str, Any] = {"tid": number}
        made.__setstate__(state | ({"shape": shape, "dtype": pending.dtype} if self.full else {}))
        return made


def xser(path: str, value: Any, reference: Reference) -> tuple[list[Output], dict[int, Pending]]:
    """A file with references, and a file for each tensor; and the tensors by number."""
    tensors: list[Pending] = []

    def replaced(inner: Any) -> Any:
        if isinstance(inner, Pending):
            tensors.append(inner)
            return reference.of(len(tensors) - 1, inner)
        if isinstance(inner, dict):
            return {key: replaced(item) for key, item in inner.items()}
        return [replaced(item) for item in inner] if isinstance(inner, list) else inner

    main = torch_zip.Zip(replaced(value))
    outputs = [
        Output(f"{path}.tensors/tensor_{number}.pt", saved.length, saved.stream)
        for number, tensor in enumerate(tensors)
        for saved in (torch_zip.one_tensor(tensor.what, tensor.dtype, tensor.shape),)
    ]
    return [*outputs, Output(path, main.length, main.stream)], dict(enumerate(tensors))
