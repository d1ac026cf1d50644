"""An import: once for any number of processes, kept beside the source, made anew when the source is another."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import nxdt_nemo
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.imported import digest_of, imported
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError

from .conftest import assert_same, read, slow_writes

Copied = Callable[[str], Path]
# Imports argv[1] where argv[2:] says, slowly, and prints the path and whether it was made here.
ONE = f"""{slow_writes(0.3)}
import sys
from pathlib import Path
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.imported import imported
places = [Path(name) for name in sys.argv[2:]]
found = imported(Path(sys.argv[1]), "nemo", places, Options(), lambda source: Target(), say=print)
print(found.path, found.report is not None)
"""


def once(path: Path, places: Sequence[Path], to: str = "nemo", optimizer: bool = False) -> Path:
    kinds = ("model", "fp32_param", "exp_avg", "exp_avg_sq") if optimizer else ("model",)
    return imported(path, to, places, Options(optimizer=optimizer), lambda source: Target(kinds=kinds)).path


def test_processes_at_once_make_one(copied: Copied) -> None:
    source = copied("hf_llama_tiny")
    environment = {**os.environ, "PYTHONPATH": str(Path(nxdt_nemo.__file__).parent.parent)}
    command = [sys.executable, "-c", ONE, str(source), str(source.parent)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    paths, made = zip(*(text.splitlines()[-1].rsplit(" ", 1) for text in said), strict=True)
    assert sorted(made) == ["False", "True"]
    assert set(paths) == {str(once(source, [source.parent]))}
    assert {at.name for at in source.parent.iterdir()} == {"source", Path(paths[0]).name}
    assert_same(read(source, optimizer=False), read(Path(paths[0]), optimizer=False), ("model",))


def test_another_source_is_another_import(copied: Copied) -> None:
    source = copied("hf_llama_tiny")
    first = once(source, [source.parent])
    assert once(source, [source.parent]) == first
    assert digest_of(source, "nemo") != digest_of(source, "nemo", "bfloat16")
    os.utime(source / "config.json")
    second = once(source, [source.parent])
    assert second != first
    assert first.is_dir()  # another run may be reading it
    weights = next(source.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    status = weights.stat()
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copying tool does
    assert once(source, [source.parent]) not in (first, second)


def test_a_running_jobs_new_iteration(copied: Copied, tmp_path: Path) -> None:
    """Only the iteration that is imported counts."""
    source = copied("ll_td_tp2pp2")
    first = once(source, [tmp_path / "imports"], "nemo_dist", True)
    assert first.name.endswith("-consumed_samples=8.0")
    (source / "iter_0000004").mkdir()
    assert once(source, [tmp_path / "imports"], "nemo_dist", True) == first


def test_places(copied: Copied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that can be written; what is in another is found there."""
    source = copied("hf_llama_tiny")
    closed, mine = source.parent, tmp_path / "run" / "imported"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    with pytest.raises(UserError, match="cannot be written"):
        once(source, [closed])
    mine.parent.mkdir()
    found = once(source, [closed, mine])
    assert found.parent == mine
    monkeypatch.undo()
    assert once(source, [closed, mine]) == found


def test_a_half_is_no_import(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copied("hf_llama_tiny")

    def full(handle: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="disk is full"):
        once(source, [source.parent])
    (half,) = source.parent.glob("source.imported-*")
    assert half.suffix == ".partial"
    monkeypatch.undo()
    found = once(source, [source.parent])
    assert found == half.with_suffix("")
    assert not half.exists()
    assert_same(read(source, optimizer=False), read(found, optimizer=False), ("model",))


def test_what_nothing_can_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        once(tmp_path / "gone", [tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="an empty folder"):
        once(tmp_path / "empty", [tmp_path])
    assert [at.name for at in tmp_path.iterdir()] == ["empty"]


def test_the_source_may_be_a_conversion_of_ours(copied: Copied, tmp_path: Path) -> None:
    source = copied("hf_llama_tiny")
    convert(source, tmp_path / "torch", "torch")
    found = once(tmp_path / "torch", [tmp_path])
    assert_same(read(source, optimizer=False), read(found, optimizer=False), ("model",))


def test_of_nemos_own_only_a_gpt_by_rank_is_foreign(hf_model: Copied, tmp_path: Path) -> None:
    """Distributed weights, and models of other kinds, are left to NeMo."""
    from nxdt_nemo.checkpoint.formats.nemo import is_gpt_by_rank

    source = hf_model("gpt2")
    convert(source, tmp_path / "distributed.nemo", "nemo")
    convert(source, tmp_path / "folder", "nemo", wanted=Target(Layout(tp=2)))
    convert(source, tmp_path / "ranks", "nemo", wanted=Target(Layout(tp=2), extra={"weights": "file"}))
    assert not is_gpt_by_rank(tmp_path / "distributed.nemo")
    assert not is_gpt_by_rank(tmp_path / "folder")
    assert is_gpt_by_rank(tmp_path / "ranks")
    assert_same(read(source, optimizer=False), read(once(tmp_path / "ranks", [tmp_path]), optimizer=False), ("model",))
    config = tmp_path / "ranks/model_config.yaml"
    config.write_text(config.read_text().replace("MegatronGPTModel", "MegatronT5Model"))
    assert not is_gpt_by_rank(tmp_path / "ranks")
