"""context/io.json: what is written is Fiddle's form of it, and nothing that one names is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dialects import nemo_context
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError

Unpacked = Callable[[str], Path]
TREE = {
    "_target_": "package.Context",
    "model": {
        "_target_": "package.model.Model",
        "sizes": [1, [2.5, None]],
        "act": {"_target_": "m.silu", "_call_": False},
    },
    "extra": {"a 'key'": {"b": True}},
}


def test_there_and_back() -> None:
    assert nemo_context.read(nemo_context.write(TREE), "here") == TREE


def test_fiddle_reads_it() -> None:
    """By Fiddle itself, classes of the standard library in the place of NeMo's."""
    serialization = pytest.importorskip("fiddle.experimental.serialization")
    import fiddle

    tree = {
        "_target_": "fractions.Fraction",
        "numerator": {"_target_": "fractions.Fraction", "numerator": 3},
        "denominator": 4,
    }
    config = serialization.load_json(nemo_context.write(tree))
    assert str(fiddle.build(config)) == "3/4"
    assert nemo_context.read(serialization.dump_json(config).encode(), "here") == tree


def test_a_folder_says_its_classes(unpacked: Unpacked, tmp_path: Path) -> None:
    convert(unpacked("hf_mixtral_tiny"), tmp_path / "there", "nemo2", wanted=Target(Layout(tp=2)))
    source = formats.read(tmp_path / "there", Options())
    assert {key: name.rpartition(".")[2] for key, name in source.detail["nemo2_context"].items()} == {
        "model": "MixtralModel",
        "config": "MixtralConfig",
        "tokenizer": "AutoTokenizer",
    }
    (tmp_path / "there/context/model.yaml").unlink()  # older ones have io.json alone
    assert formats.read(tmp_path / "there", Options()).model == source.model


def without(tree: dict[str, Any], key: str) -> bytes:
    config = {name: value for name, value in tree["model"]["config"].items() if name != key}
    return nemo_context.write({**tree, "model": {**tree["model"], "config": config}})


def cycle(tree: dict[str, Any]) -> bytes:
    graph = json.loads(nemo_context.write(tree))
    for node in graph["objects"].values():
        node["items"].append(["Attr(name='again')", graph["root"]])
    return json.dumps(graph).encode()


BAD: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "no json": (lambda tree: b"{", "is no graph of Fiddle's"),
    "a list": (lambda tree: b"[1]", "is no graph of Fiddle's"),
    "cut": (lambda tree: nemo_context.write(tree).replace(b'"type"', b'"kind"'), "is no graph of Fiddle's: 'type'"),
    "a cycle": (cycle, "deeper than 64 objects, or a cycle"),
    "values of a class": (lambda tree: without(tree, "rotary_base"), "leaves values to classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_one(case: str, unpacked: Unpacked, tmp_path: Path) -> None:
    make, said = BAD[case]
    folder = tmp_path / "there"
    convert(unpacked("hf_llama_tiny"), folder, "nemo2")
    path = folder / "context/io.json"
    path.write_bytes(make(nemo_context.read(path.read_bytes(), "here")))
    (folder / "context/model.yaml").unlink()
    with pytest.raises(UserError, match=said):
        formats.read(folder, Options())


def test_names_are_not_imported(unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "there"
    convert(unpacked("hf_llama_tiny"), folder, "nemo2")
    path = folder / "context/io.json"
    for word in (b"nemo.collections.llm.gpt.model.llama", b"fiddle._src.config"):
        changed = path.read_bytes().replace(b'"' + word + b'"', b'"evil_module"')
        (tmp_path / "changed.json").write_bytes(changed)
        path.write_bytes(changed)
        formats.read(folder, Options())
    assert "evil_module" not in sys.modules
