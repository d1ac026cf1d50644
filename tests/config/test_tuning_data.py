"""A bad line of jsonl is one error that names the file and the line, before a run starts."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import tuning_data
from nxdt_nemo.config.tuning_data import data_errors
from nxdt_nemo.config.view import View

PLAIN = {"label_key": "output", "prompt_template": "{input} {output}"}
GOOD = {
    "plain": {"input": "a", "output": "b", "more": [1]},
    "chat": {"system": "", "mask": "User", "conversations": [{"from": "User", "value": "a"}]},
    "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


def found(kind, file, split="train_ds", **keys):
    data = {split: {"file_names": [str(file)], **PLAIN, **keys}, "chat": kind == "chat"}
    cfg = {"model": {"data": data}} | ({"neuron": {"alignment": {"dpo": {}}}} if kind == "dpo" else {})
    return [str(error) for error in data_errors(View(OmegaConf.create(cfg)))]


BAD = [
    ("plain", '{"input": "a", ', "is not JSON: "),
    ("plain", '["a"]', "is not a JSON object"),
    ("plain", '{"input": "a"}', "has no 'output', only 'input'"),
    ("plain", '{"input": 3, "output": "b"}', "'input' is of type int, not text"),
    ("plain", "", "is empty"),
    ("chat", '{"system": "", "conversations": "hello"}', "has no 'conversations'"),
    ("chat", '{"system": "", "conversations": [{"value": "a"}]}', "turn 1 has no 'from'"),
    ("dpo", '{"prompt": "a", "chosen": "b"}', "has no 'rejected'"),
]


@pytest.mark.parametrize("kind, line, reason", BAD)
def test_the_first_bad_line_is_named(tmp_path, kind, line, reason):
    file, good = tmp_path / "x.jsonl", json.dumps(GOOD[kind])
    file.write_text(f"{good}\n{good}\n{line}\n{good}\n{{\n")
    (said,) = found(kind, file)
    assert said.startswith(f"{file}:3: {reason}")
    file.write_text(f"{good}\n{good}\n\n")
    assert found(kind, file) == []


def test_what_is_looked_at(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"input": "\xff", "output": "b"}\n')
    assert found("plain", file)[0].startswith(f"{file}:1: is not text in UTF-8")
    file.write_text('{"input": "a"}\n')
    assert found("plain", file, "test_ds") == []
    assert found("plain", file, packed_sequence=True) == []
    assert "does not exist" in found("plain", tmp_path / "none")[0]
    file.write_text("")
    assert found("plain", file)[0].startswith(f"{file}: has no lines")


def test_the_head_of_a_file_is_looked_at(tmp_path, monkeypatch):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(GOOD['plain'])}\n" * 100 + "{\n")
    assert len(found("plain", file)) == 1
    monkeypatch.setattr(tuning_data, "MOST", 1000)
    assert found("plain", file) == []
