"""The rules of model.data.data_prefix: is it there, does it read as weights and paths, do the files exist.

Room config/ (leaf). Stands in for what megatron.core.datasets.utils.get_blend_from_list takes for granted.
May import the standard library and nxdt_nemo.errors. Proof: tests/config/test_data_prefix.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["as_list", "prefix_errors"]

KEY = "model.data.data_prefix"
SPLITS = ("train", "validation", "test")
EXAMPLE = f"give the path of a .bin/.idx pair without its ending: {KEY}=[/data/corpus_text_document]"


def as_list(value: Any) -> Any:
    """Text as the list that NeMo expects: "0.5 a 0.5 b" is ["0.5", "a", "0.5", "b"]; other values as they are."""
    return value.split() if isinstance(value, str) else value


def prefix_errors(view: View) -> Iterator[ConfigError]:
    """Errors of the data of a pretraining config; none when its data is mock, of another format, or remote."""
    implementation = view.get("model.data.data_impl", "mmap")
    if not view.has(KEY) and not view.has("model.data.splits_string"):
        return
    if view.has("model.data.train_ds"):  # tuning reads that
        return
    if implementation == "mock":
        return
    value = view.get(KEY)
    if implementation == "arrow":
        yield from _folder_errors(view, value)
        return
    if value is None or value == [] or value == {}:
        yield view.error(f"{KEY} is not set", f"{EXAMPLE}, or model.data.data_impl=mock")
        return
    blends = {KEY: value}
    if isinstance(value, dict):
        if missing := [split for split in SPLITS if not value.get(split)]:
            yield view.error(f"{KEY} has no {' and no '.join(missing)}", "name train, validation and test")
        blends = {f"{KEY}.{split}": value[split] for split in SPLITS if value.get(split)}
    for key, blend in blends.items():
        yield from _blend_errors(view, key, as_list(blend), files=implementation == "mmap")


def _folder_errors(view: View, value: Any) -> Iterator[ConfigError]:
    """Of rows of token ids: a GPT's, a folder for each split, and one to validate with if the run validates."""
    if other := [key for key in ("model.mcore_bert", "model.mcore_t5") if view.get(key)]:
        yield view.error(f"model.data.data_impl=arrow is of GPT, and {other[0]} is set", "give a .bin/.idx corpus")
        return
    folders = value if isinstance(value, dict) else {}
    if not folders.get("train"):
        yield view.error(f"{KEY}.train is not set", f"{KEY}.train=[/data/tokens], as Dataset.save_to_disk wrote it")
        return
    for split in (split for split in SPLITS if folders.get(split)):
        named = as_list(folders[split])
        if not isinstance(named, list) or len(named) != 1:
            yield view.error(f"{KEY}.{split}={folders[split]} is not one folder", f"write {KEY}.{split}=[/data/tokens]")
        elif "://" not in str(named[0]) and not os.path.isdir(str(named[0])):
            yield view.here(f"{KEY}.{split}: {named[0]} is no folder", "name one that Dataset.save_to_disk wrote")
    validates = view.get("trainer.limit_val_batches", 1.0)
    if validates and not folders.get("validation"):
        fix = "name a folder, or set trainer.limit_val_batches=0.0"
        yield view.error(f"{KEY}.validation is not set, and trainer.limit_val_batches={validates}", fix)


def _number(item: Any) -> bool:
    try:
        float(item)
    except (TypeError, ValueError):
        return False
    return True


def _blend_errors(view: View, key: str, blend: Any, *, files: bool) -> Iterator[ConfigError]:
    if not isinstance(blend, list):
        yield view.error(f"{key}={blend} is neither a path nor a list", EXAMPLE)
        return
    weights = [_number(item) for item in blend]
    alternating = len(blend) % 2 == 0 and weights == [True, False] * (len(blend) // 2)
    if any(weights) and not alternating:
        shown = ",".join(str(item) for item in blend)
        yield view.error(f"{key}=[{shown}] does not alternate weights and paths", f"write {key}=[0.7,/a,0.3,/b]")
        return
    if files:
        for prefix in (str(item).strip() for item in (blend[1::2] if alternating else blend)):
            yield from _file_errors(view, key, prefix)


def _file_errors(view: View, key: str, prefix: str) -> Iterator[ConfigError]:
    """The pair of files of one prefix; a remote one is not looked at."""
    if "://" in prefix:
        return
    absent = [ending for ending in (".bin", ".idx") if not os.path.isfile(prefix + ending)]
    if not absent:
        return
    path, fix = Path(prefix), EXAMPLE
    if path.suffix in (".bin", ".idx") and path.is_file():
        fix = f"leave the ending off: {path.with_suffix('')}"
    elif near := sorted(path.parent.glob(f"{path.name}*.idx")) if path.name else []:
        fix = f"did you mean {near[0].with_suffix('')}?"
    yield view.here(f"{key}: {prefix}{absent[0]} does not exist", fix)
