"""Checkpoints at a URL: the same bytes come out, and only ranges of large files are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nxdt_nemo.checkpoint import catalog
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.io import remote
from nxdt_nemo.checkpoint.io.remote import path_of
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.cli.main import main
from nxdt_nemo.errors import UserError

from .conftest import KINDS, assert_same, read

Unpacked = Callable[[str], Path]


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def uploaded(files: Any, folder: Path, name: str) -> str:
    for at in folder.rglob("*"):
        if at.is_file():
            files.pipe_file(f"/bucket/{name}/{at.relative_to(folder).as_posix()}", at.read_bytes())
    return f"memory://bucket/{name}"


def requests(files: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What will be read: file and bytes of each request."""
    seen: list[tuple[str, int]] = []
    original = files.cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        seen.append((path.rpartition("/")[2], end - start))
        found: bytes = original(path, start=start, end=end)
        return found

    monkeypatch.setattr(files, "cat_file", cat_file)
    return seen


def test_safetensors_are_read_in_ranges(
    memory: Any, unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = unpacked("hf_llama_tiny")
    url = uploaded(memory, source, "llama")
    seen = requests(memory, monkeypatch)
    monkeypatch.setattr(catalog, "_BLOCK", 20_000)
    monkeypatch.setattr(remote, "BLOCK", 20_000)
    for to, layout in (("torch_dist", Layout(tp=2, pp=2)), ("torch", Layout(tp=4)), ("hf", Layout())):
        convert(path_of(url), tmp_path / to, to, wanted=Target(layout))
        assert_same(read(source, optimizer=False), read(tmp_path / to, optimizer=False), ("model",))
        assert next((tmp_path / to).rglob("tokenizer.json")).read_bytes() == (source / "tokenizer.json").read_bytes()
    largest = max(size for name, size in seen if name == "model.safetensors")
    whole = (source / "model.safetensors").stat().st_size
    assert largest <= 1000 * 64 * 2 < whole / 4, (largest, whole)  # a tensor, at most


@pytest.mark.parametrize("name", ["ll_torch_tp2pp2_do", "ll_td_tp2pp2"])
def test_megatrons_with_optimizer(
    name: str, memory: Any, unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of small arrays, in requests of a megabyte that read nothing twice."""
    url = uploaded(memory, unpacked(name), name)
    seen = requests(memory, monkeypatch)
    wanted = Target(Layout(tp=4), kinds=KINDS)
    convert(path_of(url), tmp_path / "out", "torch_dist", Options(optimizer=True), wanted)
    assert assert_same(read(unpacked(name)), read(tmp_path / "out")) == 156
    assert len(seen) < 25 and sum(size for _, size in seen) <= memory.du(url)


def test_an_archive(memory: Any, unpacked: Unpacked, tmp_path: Path) -> None:
    convert(unpacked("hf_llama_tiny"), tmp_path / "m.nemo", "nemo", wanted=Target(Layout(tp=2)))
    memory.pipe_file("/bucket/m.nemo", (tmp_path / "m.nemo").read_bytes())
    convert(path_of("memory://bucket/m.nemo"), tmp_path / "back", "hf")
    assert_same(read(unpacked("hf_llama_tiny")), read(tmp_path / "back"), ("model",))


def test_by_the_command(unpacked: Unpacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{unpacked('hf_llama_tiny')}"
    for arguments in (["inspect", url], ["convert", url, str(tmp_path / "out"), "--to", "torch", "--verify"]):
        with pytest.raises(SystemExit) as ended:
            main(["ckpt", *arguments])
        assert not ended.value.code
    assert "logits   skipped: the source is at a URL" in capsys.readouterr().out
    assert_same(read(unpacked("hf_llama_tiny")), read(tmp_path / "out", optimizer=False), ("model",))


def test_what_is_wrong_is_one_line(
    memory: Any, unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Path(shutil.copytree(unpacked("hf_llama_tiny"), tmp_path / "bad"))
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-9])
    cases = {
        "memory://bucket/none": "cannot be opened",
        uploaded(memory, bad, "bad"): "its header says",
        "nosuch://bucket/x": "cannot be listed",
    }
    for url, said in cases.items():
        with pytest.raises(UserError, match=said) as caught:
            convert(path_of(url), tmp_path / "out", "torch")
        assert url in str(caught.value) and "\n" not in str(caught.value)
    url = uploaded(memory, unpacked("hf_llama_tiny"), "changing")
    path, target = path_of(url), tmp_path / "out"
    monkeypatch.setattr(remote, "BLOCK", 20_000)
    original = memory.cat_file

    def changed(path: str, start: int, end: int) -> bytes:
        """Somebody uploads another file meanwhile."""
        if path.endswith("safetensors") and start > 100_000:
            memory.pipe_file(path, original(path))
        found: bytes = original(path, start=start, end=end)
        return found

    monkeypatch.setattr(memory, "cat_file", changed)
    with pytest.raises(UserError, match="changed while it was read"):
        convert(path, target, "torch")
    assert not target.exists()
