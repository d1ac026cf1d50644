"""The JSON lines that tuning and preference training read, looked at before a run starts: file and line of the first
that is wrong.

Room config/ (leaf). Stands around nemo.collections.nlp.data.language_modeling.megatron.{gpt_sft_dataset,
gpt_sft_chat_dataset}, which find a bad line when they come to it, with a traceback on each rank, hours into training.
May import the standard library and nxdt_nemo.errors. Proof: tests/config/test_tuning_data.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["PAIR", "data_errors", "line_errors", "missing_text", "object_of"]

SPLITS = ("train_ds", "validation_ds", "test_ds")
PAIR = ("prompt", "chosen", "rejected")
MOST = 1 << 28  # bytes that are looked at of a file: some seconds


def data_errors(view: View) -> Iterator[ConfigError]:
    """What is wrong with the files of model.data.*_ds, the first of each file."""
    for split in SPLITS:
        key = f"model.data.{split}"
        names = view.get(f"{key}.file_names")
        if not isinstance(names, list) or view.get(f"{key}.packed_sequence", False) or view.get(f"{key}.hf_dataset"):
            continue
        wrong = _judge(view, key)
        for name in names:
            path = Path(str(name)).expanduser()
            if "://" in str(name):
                continue
            if not path.is_file():
                yield view.here(f"{key}.file_names: {name} does not exist", "name jsonl files")
            else:
                yield from line_errors(path, wrong)


def _judge(view: View, key: str) -> Callable[[dict[str, Any]], str]:
    """What a line of this set has to be: a function that says what is wrong with it, "" if nothing is."""
    if view.preferences:
        return lambda found: missing_text(found, PAIR)
    if view.get("model.data.chat", False):
        return _conversation
    label = view.get(f"{key}.label_key", "answer")
    fields = re.findall(r"{(.*?)}", str(view.get(f"{key}.prompt_template", "")))
    if key.endswith("test_ds"):  # a question alone is enough to be answered
        fields = [name for name in fields if name != label]
    return lambda found: missing_text(found, fields)


def missing_text(found: dict[str, Any], fields: tuple[str, ...] | list[str]) -> str:
    """Which of the fields is not there, or is no text; "" if all are."""
    for name in fields:
        if name not in found:
            return f"has no {name!r}, only {', '.join(map(repr, found)) or 'nothing'}"
        if not isinstance(found[name], str):
            return f"{name!r} is of type {type(found[name]).__name__}, not text"
    return ""


def _conversation(found: dict[str, Any]) -> str:
    """NeMo's chat: {"system": "...", "conversations": [{"from": "User", "value": "..."}, ...], "mask": "User"}."""
    turns = found.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no 'conversations', a list of turns"
    if wrong := missing_text(found, ("system",)):
        return wrong
    for number, turn in enumerate(turns, start=1):
        wrong = missing_text(turn, ("from", "value")) if isinstance(turn, dict) else "is no object"
        if wrong:
            return f"turn {number} {wrong}"
    return ""


def line_errors(path: Path, wrong: Callable[[dict[str, Any]], str]) -> Iterator[ConfigError]:
    """The first bad line of a file, as one error that names file and line."""
    read, blank = 0, 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            read += len(line)
            if read > MOST:
                return
            if not line.strip():
                blank = blank or number
                continue
            if blank:  # at the end of a file they do no harm
                yield ConfigError("is empty", place=f"{path}:{blank}", fix="write one JSON object a line")
                return
            if reason := _reason(line, wrong):
                yield ConfigError(reason, place=f"{path}:{number}", fix="write one JSON object a line")
                return
    if not read or blank == 1:
        yield ConfigError("has no lines", place=str(path), fix="write one JSON object a line")


def _reason(line: bytes, wrong: Callable[[dict[str, Any]], str]) -> str:
    try:
        return wrong(object_of(line))
    except ValueError as error:
        return str(error)


def object_of(line: str | bytes) -> dict[str, Any]:
    """A line's JSON object. Raises ValueError, which says what the line is instead."""
    try:
        found = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("is not text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found
