"""megatron-core's `torch_dist`: a torch distributed checkpoint (DCP) of whole-model tensors, and common.pt.

Room checkpoint/ (leaf). Read without DCP, whose reader unpickles `.metadata` as it comes; written with the
names of its classes. Each item of a `.distcp` file is a torch.save of its own. May import this room.
Proof: tests/checkpoint/test_fixtures.py, test_resume.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint.boxes import Box
from nxdt_nemo.checkpoint.catalog import Wanted
from nxdt_nemo.checkpoint.dialects.megatron_core import DISTRIBUTED, DISTRIBUTED_TE
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType, Raw
from nxdt_nemo.checkpoint.formats import distributed, megatron
from nxdt_nemo.checkpoint.formats.base import Bytes, Options, Output, Reader, Source, Target, Writer, constant, zipped
from nxdt_nemo.checkpoint.io import torch_zip, unpickle
from nxdt_nemo.checkpoint.io.files import Extent, Files, Mapped, checked_path
from nxdt_nemo.checkpoint.io.pickling import STRIDED, Size, dumps, scalar
from nxdt_nemo.checkpoint.io.unpickle import Inert, inert
from nxdt_nemo.checkpoint.layout import Layout, padded
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Stored, chunks, rows_of
from nxdt_nemo.errors import UserError

__all__ = ["READERS", "WRITERS", "TorchDistReader", "TorchDistWriter", "items_in", "items_of"]

METADATA, COMMON, KIND = ".metadata", "common.pt", "metadata.json"


@dataclass
class Blob:
    """An array that is an item of a `.distcp` file. Looked into when it is read."""

    file: Mapped
    key: str
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def place(self) -> str:
        return f"{self.file.path}: {self.key}"

    @cached_property
    def extent(self) -> Extent:
        """Its elements. Raises UserError if they are not what `.metadata` says."""
        found = torch_zip.read(self.file, self.offset, self.length)
        if not isinstance(found, Extent) or found.shape != self.shape or found.dtype != self.dtype:
            raise UserError(f"{self.key} is not the {list(self.shape)} that {METADATA} says", place=str(self.file.path))
        return found

    def read(self, box: Box) -> Raw:
        return self.extent.read(box)


def items_of(path: Path, files: Files) -> dict[str, distributed.Item]:
    """The arrays of a folder with `.metadata`, by key. Objects that are no tensors are left out."""
    data = checked_path(path / METADATA).read_bytes()

    def locate(name: str) -> tuple[Mapped, int, int]:
        file = files(path / name)
        return file, 0, file.size

    return items_in(path, data, locate)


def items_in(path: Path, data: bytes, locate: Callable[[str], tuple[Mapped, int, int]]) -> dict[str, distributed.Item]:
    """The same of a folder that may lie in an archive.

    data    what `.metadata` holds
    locate  the file that holds a member of the folder, where it begins there, and its size
    """
    at = path / METADATA
    metadata = unpickle.load(data, str(at))
    if not isinstance(metadata, Inert) or not isinstance(metadata.get("storage_data"), dict):
        raise UserError("is no metadata of a distributed checkpoint", place=str(at))
    try:
        return _items(path, locate, metadata)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"is not understood: {error!r}", place=str(at), fix="the file is damaged") from error


def _items(
    path: Path, locate: Callable[[str], tuple[Mapped, int, int]], metadata: Inert
) -> dict[str, distributed.Item]:
    where: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in metadata.get("storage_data").items():
        where.setdefault(index.get("fqn"), {})[tuple(index.get("offset") or ())] = info
    items = {}
    for key, entry in metadata.get("state_dict_metadata").items():
        size = entry.get("size")
        if size is None:
            continue
        dtype = entry.get("properties").state[0]
        item = distributed.Item(tuple(size), dtype)
        for chunk in entry.get("chunks"):
            box = Box(tuple(chunk.get("offsets")), tuple(chunk.get("sizes")))
            info = where.get(key, {}).get(box.start)
            if info is None:
                raise UserError(f"chunk {list(box.start)} of {key} is in no file", place=str(path / METADATA))
            if info.get("transform_descriptors"):
                raise UserError(f"{key} is compressed", place=str(path / METADATA))
            name = str(info.get("relative_path"))
            if Path(name).name != name:
                raise UserError(f"{key} is in {name}, outside the folder", place=str(path / METADATA))
            file, begin, held = locate(name)
            offset, length = info.get("offset"), info.get("length")
            if offset < 0 or length < 0 or offset + length > held:
                reason = f"ends at byte {held}, but bytes {offset} to {offset + length} are referred to"
                raise UserError(reason, place=str(path / name), fix="the file is cut short: copy it again")
            item.chunks.append((box, Blob(file, key, begin + offset, length, box.size, dtype)))
        items[key] = item
    return items


class TorchDistReader(Reader):
    """Reads what megatron-core 0.8 to 0.16 writes, sharded optimizer or not."""

    format = "torch_dist"

    def looks_like(self, path: Path) -> bool:
        try:
            return (megatron.folder_of(path, None) / METADATA).exists()
        except UserError:
            return False

    def read(self, path: Path, options: Options) -> Source:
        folder = megatron.folder_of(path, options.step)
        files = Files()
        items = items_of(folder, files)
        common = torch_zip.read(files(folder / COMMON)) if (folder / COMMON).exists() else {}
        if not isinstance(common, dict):
            raise UserError("is no dict", place=str(folder / COMMON))
        listed = sorted({at.path for at in files} | {folder / METADATA})
        return distributed.build(self.format, folder, items, common, options, listed)


@dataclass(frozen=True)
class _Chunk:
    """An item to write: its key, where it lies in the whole array, and what it is made of."""

    key: str
    box: Box
    want: Wanted

    def blob(self) -> torch_zip.Zip:
        return torch_zip.one_tensor(self.want, self.want.dtype, self.box.size)


@dataclass(frozen=True)
class _Object:
    """The state that TransformerEngine's linear layers have beside their tensors: none. Stock loaders ask for it."""

    key: str

    def blob(self) -> torch_zip.Zip:
        return torch_zip.Zip([None])


_Entry = _Chunk | _Object


@dataclass
class TorchDistWriter(Writer):
    """Writes a folder that megatron-core 0.13 loads at any layout.

    Options: optimizer_format, `fully_sharded_model_space` (Megatron's distributed optimizer) or `model_space`
    (its others, and all of this backend's); spec, `te` for a run with TransformerEngine's layers: another name before
    experts.
    """

    format = "torch_dist"
    prefix: str = ""  # before all keys; NeMo's are `model.` and `module.`
    _whole: dict[str, tuple[tuple[int, ...], DType]] = field(default_factory=dict)
    _original: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _items: dict[str, list[tuple[_Entry, int, int]]] = field(default_factory=dict)

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        layout = Layout(
            target.layout.tp, target.layout.pp, 1, target.layout.ep, target.layout.etp, target.layout.stages
        )
        if source.model.decoder_layers:  # not cut into stages: any rank reads what it needs
            layout = Layout(layout.tp)
        if source.model.groups % layout.tp:  # no chunk is less than a query group; ranks read parts of them
            layout = replace(layout, tp=math.gcd(layout.tp, source.model.groups))
        layout.check(source.model.layers, source.model.experts)
        rows = padded(source.model.vocab, target.divisible_by, target.layout.tp)
        self._flat = target.extra.get("optimizer_format", "fully_sharded_model_space") == "fully_sharded_model_space"
        if self._flat and len(target.kinds) > 1 and "fp32_param" not in target.kinds:
            # Megatron's distributed optimizer has main parameters of float32 weights too, and asks for them.
            source.catalog.copy("model", "fp32_param")
            target = replace(target, kinds=(*target.kinds, "fp32_param"))
        self._source, self._target = source, target
        self._model = source.model.with_(padded_vocab=rows)
        self._folder = self.folder()
        for rank, found in enumerate(_by_rank(self, source, target, layout)):
            if found:
                yield self._file(f"__{rank}_0.distcp", found)

    def folder(self) -> str:
        """Where it is written, a path in the target."""
        return megatron.iteration_name(self._source.training.iteration)

    def _file(self, name: str, found: list[_Entry]) -> Output:
        offset, placed = 0, []
        for chunk in found:
            length = chunk.blob().length
            placed.append((chunk, offset, length))
            offset += length
        self._items[name] = placed

        def stream() -> Iterator[Bytes]:
            for chunk in found:
                yield from chunk.blob().stream()

        return Output(f"{self._folder}/{name}", offset, stream)

    def last(self) -> Iterable[Output]:
        yield from megatron.asset_outputs(self._source)
        yield from self.indexes()
        iteration = self._source.training.iteration
        yield constant(megatron.TRACKER, b"release" if iteration is None else str(iteration).encode())

    def indexes(self) -> Iterable[Output]:
        """common.pt, `.metadata` and metadata.json."""
        folder = self._folder
        yield zipped(f"{folder}/{COMMON}", self.common())
        kind = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        kind |= {"common_backend": "torch", "common_backend_version": 1}
        yield constant(f"{folder}/{METADATA}", self._metadata())
        yield constant(f"{folder}/{KIND}", json.dumps(kind).encode())

    def common(self) -> dict[str, Any]:
        """What common.pt holds."""
        source, training = self._source, self._source.training
        dtype = self._target.dtype or source.dtype
        common: dict[str, Any] = {
            "args": megatron.args_for(source, self._model, self._target.layout, dtype),
            "checkpoint_version": 3.0,
            "iteration": training.iteration or 0,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": {},
        }
        if len(self._target.kinds) > 1:
            common["optimizer"] = self.optimizer(dtype)
            common["content_metadata"] = (
                {"distrib_optim_sharding_type": "fully_sharded_model_space"} if self._flat else {}
            )
        if training.scheduler:
            common["opt_param_scheduler"] = training.scheduler
        return common

    def optimizer(self, dtype: DType) -> dict[str, Any]:
        """The optimizer's state without its tensors."""
        training = self._source.training
        step = scalar(training.step or 0.0)
        groups = [dict(group) for group in training.groups]
        if self._flat:
            groups = [{**group, "step": training.step} for group in groups]
            kind = "fully_sharded_model_space"
            return {"optimizer": {"param_groups": groups}, "param_state": {}, "param_state_sharding_type": kind}
        inner = {"state": {"common_step": step}, "param_groups": groups}
        return inner if dtype == FLOAT32 else {"optimizer": inner}

    def _metadata(self) -> bytes:
        entries: dict[str, Any] = {
            key: _made("TensorStorageMetadata", properties=_properties(dtype), size=Size(shape), chunks=[])
            for key, (shape, dtype) in self._whole.items()
        }
        storage: dict[Any, Any] = {}
        for name, placed in self._items.items():
            for chunk, offset, length in placed:
                info = _made("_StorageInfo", relative_path=name, offset=offset, length=length)
                if isinstance(chunk, _Object):
                    entries[chunk.key] = _made("BytesStorageMetadata")
                    storage[_made("MetadataIndex", fqn=chunk.key, index=None)] = info
                    continue
                at = Size(chunk.box.start)
                held = entries[chunk.key].get("chunks")
                held.append(_made("ChunkStorageMetadata", offsets=at, sizes=Size(chunk.box.size)))
                storage[_made("MetadataIndex", fqn=chunk.key, index=len(held) - 1, offset=at)] = info
        # Where upstream's loader looks for the shape before flattening; it is no field of torch's class.
        original = {
            key: {"nd_reformulated_orig_global_shape": self._original[key]} if key in self._original else {}
            for key in entries
        }
        meta = _made("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[])
        metadata = _made(
            "Metadata",
            state_dict_metadata=entries,
            planner_data=None,
            storage_data=storage,
            storage_meta=meta,
            version=None,
            mcore_data=original,
        )
        return dumps(metadata)[0]

    def chunk(self, kind: str, stored: Stored, box: Box, dtype: DType | None) -> _Chunk:
        """One box of an array as it will be written."""
        name = self.prefix + stored.key
        key = name if kind == "model" else f"optimizer.state.{kind}.{name}"
        want = self._source.catalog.want(kind, stored.cut(box), dtype)
        shape, lead = stored.lead + stored.shape, (1,) * len(stored.lead)
        if kind == "model" or not self._flat:
            self._whole[key] = (shape, want.dtype)
            return _Chunk(key, Box(stored.index + box.start, lead + box.size), want)
        counts = tuple(n // size for n, size in zip(stored.shape, box.size, strict=True))
        place = tuple(start // size for start, size in zip(box.start, box.size, strict=True))
        self._whole[key] = ((*stored.lead, *counts, box.volume), want.dtype)
        self._original[key] = shape
        return _Chunk(key, Box((*stored.index, *place, 0), lead + (1,) * len(counts) + (box.volume,)), want)


_DCP = "torch.distributed.checkpoint."
_CLASSES = {
    name: inert(_DCP + ("filesystem" if name == "_StorageInfo" else "metadata"), name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
        "_StorageInfo",
    )
}


def _made(name: str, **fields: Any) -> Inert:
    """An object of one of DCP's classes, as it pickles itself."""
    made = _CLASSES[name]()
    if fields:
        made.__setstate__(fields)
    return made


@lru_cache
def _properties(dtype: DType) -> Inert:
    """TensorProperties: dtype, layout, requires_grad, memory format, pin_memory."""
    made = _CLASSES["TensorProperties"]()
    contiguous = _CLASSES["_MEM_FORMAT_ENCODING"](0)
    made.__setstate__((dtype, STRIDED, False, contiguous, False))
    return made


def _by_rank(writer: TorchDistWriter, source: Source, target: Target, layout: Layout) -> Iterator[list[_Entry]]:
    model = writer._model
    names, dialect = source.names, DISTRIBUTED_TE if target.extra.get("spec") == "te" else DISTRIBUTED
    entire = {
        (stored.key, stored.index): stored
        for stored in rows_of(dialect, model, names, _whole_shard(model), layout, local=False)
    }
    written: set[tuple[str, tuple[int, ...], Box]] = set()
    objects: set[str] = set()
    for shard in layout.shards(model.layers, model.experts):
        found: list[_Entry] = []
        for stored in rows_of(dialect, model, names, shard, layout, local=False):
            all_of_it = entire[stored.key, stored.index]
            boxes = chunks(stored, all_of_it)
            # The first of the ranks that have it writes it.
            new = [box for box in boxes if (stored.key, stored.index, box) not in written]
            written.update((stored.key, stored.index, box) for box in new)
            if new and (extra := _extra_state(stored, model)) not in objects:
                objects.add(extra)
                found += [_Object(writer.prefix + extra)] if extra else []
            for kind in target.kinds:
                dtype = {"model": target.dtype, "fp32_param": FLOAT32}.get(kind)
                found += [writer.chunk(kind, all_of_it, box, dtype) for box in new]
        yield found


def _extra_state(stored: Stored, model: Model) -> str:
    """The key of a linear layer's extra state; "" for what has none. A T5's output layer does, a GPT's does not."""
    name, _, last = stored.key.rpartition(".")
    if model.decoder_layers and name.endswith("output_layer"):
        return f"{name}._extra_state/shard_0_1"
    if not stored.lead or last != "weight" or not name.rpartition(".")[2].startswith("linear_"):
        return ""
    place, size = (".".join(map(str, numbers)) for numbers in (stored.index, stored.lead))
    return f"{name}._extra_state/shard_{place}_{size}"


def _whole_shard(model: Model) -> Any:
    return Layout().shard(model.layers, 0, 0, 0, 0, range(model.experts))


READERS = {"torch_dist": TorchDistReader}
WRITERS = {"torch_dist": TorchDistWriter}
