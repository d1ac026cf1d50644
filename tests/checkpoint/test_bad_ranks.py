"""What can be wrong with NeMo's, NNM's and NxD's checkpoints: one line with place and fix, nothing written or run."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError

from .test_bad_input import Damage, cut, evil, gone, resaved, text
from .test_unpickle import Call

Unpacked = Callable[[str], Path]
MADE: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "archive": ("nemo", Layout(tp=2), {}),
    "folder": ("nemo", Layout(tp=2), {}),
    "dist": ("nemo_dist", Layout(tp=2), {}),
    "ptl": ("ptl", Layout(tp=2, pp=2), {"names": "core"}),
    "nnm": ("nnm", Layout(tp=2), {"xser": True}),
    "nxdt": ("nxdt", Layout(tp=2, pp=2), {}),
    "xser": ("nxdt", Layout(tp=2), {"xser": True}),
    "copies": ("nxdt", Layout(tp=8), {"hw_backend": "trn1"}),
}
CKPT = "megatron_gpt--step=0.ckpt"
PTL = f"tp_rank_01_pp_rank_000/{CKPT}"
NNM = f"mp_rank_01/{CKPT}"
NXDT = "model/dp_rank_00_tp_rank_01_pp_rank_00.pt"


@pytest.fixture(scope="module")
def made(unpacked: Unpacked, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(kind): a good checkpoint, not to be changed."""
    root = tmp_path_factory.mktemp("made")

    def make(kind: str) -> Path:
        at = root / (f"{kind}.nemo" if kind == "archive" else kind)
        if not at.exists():
            to, layout, extra = MADE[kind]
            convert(unpacked("hf_llama_tiny"), at, to, wanted=Target(layout, extra=extra))
        return at

    return make


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Damage:
    """An archive with one more member."""

    def damage(path: Path) -> None:
        with tarfile.open(path, "a:") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"evil"))

    return damage


def without(name: str) -> Damage:
    """An archive without a member, or with another content of it."""

    def damage(path: Path) -> None:
        _rewritten(path, lambda info, data: None if info.name == f"./{name}" else data)

    return damage


def _rewritten(path: Path, change: Callable[[tarfile.TarInfo, bytes], bytes | None]) -> None:
    new = path.with_suffix(".new")
    with tarfile.open(path, "r:") as old, tarfile.open(new, "w:") as tar:
        for info in old:
            data = old.extractfile(info).read() if info.isreg() else b""  # type: ignore[union-attr]
            kept = change(info, data)
            if kept is not None:
                info.size = len(kept)
                tar.addfile(info, io.BytesIO(kept))
    new.replace(path)


def replaced(name: str, content: Callable[[Path], bytes]) -> Damage:
    return lambda path: _rewritten(path, lambda info, data: content(path) if info.name == f"./{name}" else data)


def a_call(path: Path) -> bytes:
    """torch.save of something that would run a command."""
    data = io.BytesIO()
    torch.save({"x": Call(os.system, f"touch {path.parent / 'executed'}")}, data)
    return data.getvalue()


def squeezed(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))


def drop(key: str) -> Callable[[Any], Any]:
    return lambda state: state.pop(key)


def drop_weight(key: str) -> Callable[[Any], Any]:
    return lambda state: state["state_dict"].pop(key)


def edited_config(path: Path) -> None:
    at = path / "config.json"
    config = json.loads(at.read_text())
    at.write_text(json.dumps({**config, "num_hidden_layers": 6}))
    (path / "user_content.pt").unlink()


def no_note(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "user_content.pt").unlink()


def no_object(path: Path) -> bytes:
    return b"a: !!python/name:os.system"


def evil_index(path: Path) -> None:
    (path / "model_weights/.metadata").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def more_layers(path: Path) -> None:
    at = path / "model_config.yaml"
    at.write_text(at.read_text().replace("num_layers: 4", "num_layers: 5"))


def small_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path / f"{NNM}.tensors/tensor_3.pt")


def third_rank(path: Path) -> None:
    shutil.copy(path / NXDT, path / "model/dp_rank_00_tp_rank_02_pp_rank_00.pt")


NORM = "model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
CASES: list[tuple[str, str, Damage, str]] = [
    ("a member outside", "archive", member("../../evil"), "would be written outside"),
    ("an absolute member", "archive", member("/tmp/evil"), "would be written outside"),
    ("a symbolic link", "archive", member("./x", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
    ("a hard link", "archive", member("./x", tarfile.LNKTYPE, "/etc/passwd"), "is a link"),
    ("a device", "archive", member("./x", tarfile.CHRTYPE), "no plain file"),
    ("an archive cut short", "archive", lambda p: p.write_bytes(p.read_bytes()[:200_000]), "ends at byte 200000"),
    ("a compressed archive", "archive", squeezed, "is a compressed archive"),
    ("no archive", "archive", lambda p: p.write_bytes(b"hello" * 400), "is no tar archive"),
    ("no configuration", "archive", without("model_config.yaml"), "has no model_config.yaml"),
    ("no index", "archive", without("model_weights/.metadata"), "has no .metadata"),
    ("a shard is missing", "archive", without("model_weights/__1_0.distcp"), "has no __1_0.distcp"),
    ("YAML with a Python object", "archive", replaced("model_config.yaml", no_object), "is no YAML"),
    ("YAML that is no mapping", "archive", replaced("model_config.yaml", lambda p: b"- 1"), "is no mapping"),
    ("a call in common.pt", "archive", replaced("model_weights/common.pt", a_call), "could run code"),
    ("a call in .metadata", "folder", evil_index, "could run code"),
    ("other layers than the configuration's", "folder", more_layers, "makes it"),
    ("no common.pt", "dist", gone("common.pt"), "does not say what the model is"),
    ("a call in a training checkpoint", "dist", evil("common.pt"), "could run code"),
    ("a shard cut short", "dist", cut("__0_0.distcp"), "cut short"),
    ("a rank is missing", "ptl", gone("tp_rank_01_pp_rank_001"), "missing: tp_rank_01_pp_rank_001"),
    ("a rank's file is missing", "ptl", gone(PTL), "missing: tp_rank_01_pp_rank_000"),
    ("a rank's file is cut short", "ptl", cut(PTL), "cut short"),
    ("a call in a rank's file", "ptl", evil(PTL), "could run code"),
    ("ranks of two steps", "ptl", resaved(PTL, lambda s: s.update(global_step=4)), "ranks differ in global_step"),
    ("a tensor is missing", "ptl", resaved(PTL, drop_weight(NORM)), "layer_norm_weight is missing"),
    ("no state_dict", "ptl", resaved(PTL, drop("state_dict")), "has no state_dict"),
    ("a tensor's file is missing", "nnm", gone(f"{NNM}.tensors/tensor_3.pt"), "refers to"),
    ("no tensors at all", "nnm", gone(f"{NNM}.tensors"), "only the optimizer's master weights"),
    ("a call in a tensor's file", "nnm", evil(f"{NNM}.tensors/tensor_3.pt"), "could run code"),
    ("a tensor of another shape", "nnm", small_tensor, "makes it"),
    ("not done", "nxdt", gone("done"), "has no done"),
    ("a rank of NxD's is missing", "nxdt", gone(NXDT), "missing: dp_rank_00_tp_rank_01_pp_rank_00.pt"),
    ("a rank too many", "nxdt", third_rank, "are missing"),
    ("a call in NxD's", "nxdt", evil(NXDT), "could run code"),
    ("a call in user_content.pt", "nxdt", evil("user_content.pt"), "could run code"),
    ("garbage in NxD's", "nxdt", text(NXDT, "hello" * 100), "is no torch.save file"),
    ("nothing says what it is", "nxdt", no_note, "--model-config"),
    ("configuration of another model", "nxdt", edited_config, "layers [4, 5] of 6"),
    ("NxD's tensors are missing", "xser", gone(f"{NXDT}.tensors"), "refers to"),
    ("a call in NxD's tensor", "xser", evil(f"{NXDT}.tensors/tensor_0.pt"), "could run code"),
    ("hardware is not known", "copies", gone("user_content.pt"), "say it: --option hw_backend"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_line(kind: str, damage: Damage, says: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    good = made(kind)
    bad = tmp_path / good.name
    shutil.copytree(good, bad) if good.is_dir() else shutil.copy(good, bad)
    damage(bad)
    with pytest.raises(UserError) as caught:
        convert(bad, tmp_path / "out", "hf")
    line = str(caught.value)
    assert says in line, line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()
    assert not [*tmp_path.rglob("executed"), *tmp_path.rglob("evil")]


ASKED: list[tuple[str, Target, str]] = [
    ("nxdt", Target(Layout(tp=8)), "say which: --option hw_backend"),
    ("nxdt", Target(Layout(tp=8), extra={"hw_backend": "trn3"}), "say which: --option hw_backend"),
    ("nxdt", Target(Layout(tp=8), extra={"style": "megatron"}), "has no copies of heads"),
    ("nxdt", Target(Layout(tp=2), extra={"style": "nemo"}), "use hf or megatron"),
    ("nxdt", Target(Layout(tp=4), extra={"kv_multiplier": 4, "hw_backend": "trn1"}), "cannot place"),
    ("nnm", Target(Layout(tp=8)), "does not divide the 4 key-value heads"),
    ("ptl", Target(Layout(tp=2)), "NeMo's own GPT has no grouped queries"),
    ("nemo", Target(Layout(tp=2), kinds=("model", "exp_avg", "exp_avg_sq")), "leave out --with-optimizer"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "wanted", "says"), ASKED)
def test_what_cannot_be_written(to: str, wanted: Target, says: str, unpacked: Unpacked, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        convert(unpacked("hf_llama_tiny"), tmp_path / "out", to, Options(), wanted)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
