"""Hugging Face folders: config.json, safetensors or torch files, one or sharded with an index, a tokenizer's files.

Room checkpoint/ (leaf). As transformers 4.51 writes and reads them. May import this room.
Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint import families
from nxdt_nemo.checkpoint.boxes import whole
from nxdt_nemo.checkpoint.catalog import Catalog, Wanted
from nxdt_nemo.checkpoint.dtypes import same
from nxdt_nemo.checkpoint.families import Family
from nxdt_nemo.checkpoint.formats.base import Bytes, Options, Output, Reader, Source, Target, Writer, constant, zipped
from nxdt_nemo.checkpoint.io import safetensors, torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.io.pickling import Pending
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Stored, rows_of
from nxdt_nemo.errors import UserError

__all__ = ["READERS", "WRITERS", "HFReader", "HFWriter"]

CONFIG = "config.json"
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
_SHARD_SIZE = 5 * 1000**3  # transformers' max_shard_size
# Beside weights and config.json: what a tokenizer and generation need.
_ASSETS = re.compile(
    r"(tokenizer.*|special_tokens_map|generation_config|vocab|merges|added_tokens|spiece|chat_template)\..*"
)


def read_json(path: Path) -> dict[str, Any]:
    """A file's object. Raises UserError naming the file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", place=str(path)) from error
    if not isinstance(found, dict):
        raise UserError("is no JSON object", place=str(path))
    return found


def model_of(path: Path, family: str = "") -> tuple[Family, Model]:
    """Family and Model of a config.json."""
    config = read_json(path)
    if "quantization_config" in config:
        raise UserError("the weights are quantized", place=str(path), fix="convert the original ones")
    found = families.by_name(family) if family else families.of_config(config, str(path))
    try:
        return found, found.from_hf(config).check(str(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"a key has a value of the wrong kind: {error}", place=str(path)) from error


class HFReader(Reader):
    """Reads `.safetensors` and `.bin`, whole or sharded."""

    format = "hf"

    def looks_like(self, path: Path) -> bool:
        return (path / CONFIG).is_file() and any(
            (path / name).exists() for name in (SAFE, BIN, SAFE + ".index.json", BIN + ".index.json")
        )

    def read(self, path: Path, options: Options) -> Source:
        family, model = model_of(options.config or path / CONFIG, options.family)
        arrays = _arrays(path)
        catalog, claimed = Catalog(), set()
        for stored in whole_model(family, model):
            key = next((key for key in (stored.key, *stored.also) if key in arrays), "")
            found = arrays.get(key)
            if found is None:
                raise UserError(f"{stored.key} is missing", place=str(path), fix="the checkpoint is not complete")
            if found.shape != stored.shape:
                reason = f"{stored.key} is {list(found.shape)}, {CONFIG} makes it {list(stored.shape)}"
                raise UserError(reason, place=str(path), fix=f"use the {CONFIG} that belongs to the weights")
            catalog.add("model", stored.parts, found, whole(found.shape))
            claimed.add(key)
        for key in arrays.keys() - claimed:
            if model.tied and key in _HEADS:
                _check_tied(path, arrays[key], catalog)
            elif not any(re.fullmatch(pattern, key) for pattern in family.ignored):
                raise UserError(f"{key} is not a tensor of {family.name}", place=str(path), fix="use --family")
        files = sorted({found.file.path for found in arrays.values()})
        assets = {at.name: at for at in sorted(path.iterdir()) if at.is_file() and _ASSETS.fullmatch(at.name)}
        return Source(self.format, path, family, model, catalog, files=[*files, path / CONFIG], assets=assets)


_HEADS = ("lm_head.weight", "cls.predictions.decoder.weight")


def _check_tied(path: Path, head: Extent, catalog: Catalog) -> None:
    block = catalog.blocks("model", "embedding.word.weight")[0]
    if (
        head.shape != block.array.shape
        or head.dtype != block.array.dtype
        or not same(head.tensor(), block.read(block.box))
    ):
        reason = f"tie_word_embeddings is true, but {head.key} differs from the embedding"
        raise UserError(
            reason, place=str(path), fix=f"set tie_word_embeddings to false in {CONFIG}, or use equal tensors"
        )


def whole_model(family: Family, model: Model) -> Iterator[Stored]:
    """The arrays of an unsharded model by Hugging Face's names."""
    layout = Layout()
    shard = layout.shard(model.layers, 0, 0, 0, 0, range(model.experts))
    return rows_of(family.rows, model, family.names(model), shard, layout, local=False)


def _arrays(path: Path) -> dict[str, Extent]:
    """All tensors of a folder, by name."""
    files = Files()
    for name in (SAFE, BIN):
        single, index = path / name, path / f"{name}.index.json"
        if index.is_file():
            return _indexed(path, index, files)
        if single.exists():
            return _file(single, files)
    raise UserError(f"has neither {SAFE} nor {BIN} nor an index", place=str(path))


def _file(path: Path, files: Files) -> dict[str, Extent]:
    if path.suffix == ".safetensors":
        return safetensors.read(files(path))
    found = torch_zip.read(files(path))
    if not isinstance(found, dict):
        raise UserError("is no dict of tensors", place=str(path))
    return {str(key): value for key, value in found.items() if isinstance(value, Extent)}


def _indexed(path: Path, index: Path, files: Files) -> dict[str, Extent]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError("has no weight_map", place=str(index))
    if strange := [name for name in set(table.values()) if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"names a file outside its folder: {strange[0]}", place=str(index))
    shards = {name: _file(path / name, files) for name in sorted(set(table.values()))}
    for key, name in table.items():
        if key not in shards[name]:
            raise UserError(f"says that {key} is in {name}, which does not have it", place=str(index))
    return {key: shards[name][key] for key, name in table.items()}


@dataclass
class HFWriter(Writer):
    """Writes safetensors (`hf`) or torch files (`hf_bin`), sharded as transformers does."""

    format = "hf"
    name: str = SAFE

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        model = source.model.with_(padded_vocab=0)
        self._source = source
        self._config = {**source.family.to_hf(model), "torch_dtype": (target.dtype or source.dtype).name}
        self._place: dict[str, str] = {}
        wanted = [
            (stored.key, source.catalog.want("model", stored, target.dtype))
            for stored in whole_model(source.family, model)
        ]
        self._total = sum(want.nbytes for _, want in wanted)
        shards = _shards(wanted, int(target.extra.get("shard_size", _SHARD_SIZE)))
        stem, suffix = self.name.rsplit(".", 1)
        for number, shard in enumerate(shards, 1):
            path = self.name if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
            self._place |= {key: path for key, _ in shard}
            yield _safe(path, shard) if suffix == "safetensors" else _bin(path, shard)

    def last(self) -> Iterable[Output]:
        for name, path in self._source.assets.items():
            yield constant(name, path.read_bytes())
        if len(set(self._place.values())) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._place.items()))}
            yield constant(f"{self.name}.index.json", json.dumps(index, indent=2).encode() + b"\n")
        yield constant(CONFIG, json.dumps(self._config, indent=2, sort_keys=True).encode() + b"\n")


class HFBinWriter(HFWriter):
    """Writes pytorch_model.bin."""

    format = "hf_bin"

    def __init__(self) -> None:
        super().__init__(BIN)


def _shards(wanted: list[tuple[str, Wanted]], limit: int) -> list[list[tuple[str, Wanted]]]:
    shards: list[list[tuple[str, Wanted]]] = [[]]
    size = 0
    for key, want in wanted:
        if shards[-1] and size + want.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((key, want))
        size += want.nbytes
    return shards


def _safe(path: str, shard: list[tuple[str, Wanted]]) -> Output:
    head = safetensors.header([(key, want.dtype, want.shape) for key, want in shard])

    def stream() -> Iterator[Bytes]:
        yield head
        for _, want in shard:
            yield from map(torch_zip.raw_bytes, want.pieces())

    return Output(path, len(head) + sum(want.nbytes for _, want in shard), stream)


def _bin(path: str, shard: list[tuple[str, Wanted]]) -> Output:
    return zipped(path, {key: Pending.of(want) for key, want in shard})


READERS = {"hf": HFReader}
WRITERS = {"hf": HFWriter, "hf_bin": HFBinWriter}
