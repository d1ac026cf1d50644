"""What can be wrong with a checkpoint, or asked of it: one line with place and fix, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Mapped
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.output import check_manifest
from nxdt_nemo.errors import UserError

from .conftest import KINDS, pending
from .test_unpickle import Call

Damage = Callable[[Path], Any]
RANK = "iter_0000002/mp_rank_00_001/model_optim_rng.pt"


def cut(name: str, keep: float = 0.6) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def gone(name: str) -> Damage:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def text(name: str, content: str | bytes) -> Damage:
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A JSON file with another content."""

    def damage(root: Path) -> None:
        found = json.loads((root / name).read_text())
        change(found)
        (root / name).write_text(json.dumps(found))

    return damage


def resaved(name: str, change: Callable[[Any], Any]) -> Damage:
    """A torch file with another content, written by us without Megatron."""

    def damage(root: Path) -> None:
        mapped = Mapped(root / name)
        found = torch_zip.read(mapped)
        change(found)
        data = b"".join(bytes(piece) for piece in torch_zip.Zip(found).stream())
        (root / name).unlink()
        (root / name).write_bytes(data)

    return damage


def link_to_itself(name: str) -> Damage:
    def damage(root: Path) -> None:
        (root / name).unlink()
        (root / name).symlink_to(root / name)

    return damage


def flipped(name: str) -> Damage:
    """A bit of the pickle in a torch file."""

    def damage(root: Path) -> None:
        entry = torch_zip.entries(Mapped(root / name))["data.pkl"]
        data = bytearray((root / name).read_bytes())
        data[entry.offset + entry.size // 2] ^= 4
        (root / name).write_bytes(data)

    return damage


def evil(name: str) -> Damage:
    return lambda root: torch.save({"model": Call(os.system, f"touch {root / 'executed'}")}, root / name)


def evil_pickle(name: str) -> Damage:
    return lambda root: (root / name).write_bytes(pickle.dumps(Call(os.system, f"touch {root / 'executed'}")))


def evil_blob(root: Path) -> None:
    """A chunk whose item is a call; its place and length stay as .metadata has them."""
    from nxdt_nemo.checkpoint.formats.torch_dist import items_of
    from nxdt_nemo.checkpoint.io.files import Files

    folder = root / "iter_0000002"
    blob = items_of(folder, Files())["decoder.layers.mlp.linear_fc2.weight"].chunks[0][1]
    torch.save(Call(os.system, f"touch {root / 'executed'}"), root / "evil")
    data, held = (root / "evil").read_bytes(), bytearray(blob.file.path.read_bytes())
    held[blob.offset : blob.offset + blob.length] = data + bytes(blob.length - len(data))
    blob.file.path.write_bytes(held)


def tied(state: Any) -> None:
    state["args"].untie_embeddings_and_output_weights = False


def without_tensor(name: str) -> Damage:
    """A safetensors file without one of its tensors."""

    def damage(root: Path) -> None:
        found = load_file(root / "model.safetensors")
        del found[name]
        (root / "model.safetensors").unlink()
        save_file(found, root / "model.safetensors")

    return damage


TORCH, DIST, ZARR, HF = "ll_torch_tp2pp2_do", "ll_td_tp2pp2", "zarr_tp1", "hf_llama_tiny"
IT = "iter_0000002/"
NORM = "decoder.layers.0.input_layernorm.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
CASES: list[tuple[str, str, Damage, str]] = [
    # name, fixture, damage, what the line says
    (
        "a rank is missing",
        TORCH,
        gone(IT + "mp_rank_01_000"),
        "1 of the 4 ranks of TP 2, PP 2 are missing: mp_rank_01_000",
    ),
    (
        "a rank too many",
        TORCH,
        lambda r: shutil.copytree(r / IT / "mp_rank_01_000", r / IT / "mp_rank_02_000"),
        "no rank of TP 2",
    ),
    ("a grid of another run", TORCH, lambda r: (r / IT / "mp_rank_00_000").rename(r / IT / "mp_rank_00"), "missing"),
    ("a rank's file is missing", TORCH, gone(RANK), "is not there"),
    ("a rank's file is cut short", TORCH, cut(RANK), "cut short"),
    ("a rank's file is empty", TORCH, text(RANK, ""), "ends at byte 0"),
    ("a rank's file is something else", TORCH, text(RANK, "hello" * 100), "is no torch.save file"),
    ("a rank's file is a link to itself", TORCH, link_to_itself(RANK), "link"),
    ("a flipped bit in a pickle", TORCH, flipped(RANK), "data.pkl is damaged"),
    ("a tracker names what is not there", TORCH, text("latest_checkpointed_iteration.txt", "7"), "names iter_0000007"),
    ("a tracker with garbage", TORCH, text("latest_checkpointed_iteration.txt", "abc"), "'abc', no iteration"),
    ("steps are mixed", TORCH, resaved(RANK, lambda s: s.update(iteration=4)), "ranks differ in iteration"),
    (
        "versions are mixed",
        TORCH,
        resaved(RANK, lambda s: s.update(checkpoint_version=2.0)),
        "ranks differ in checkpoint_version",
    ),
    (
        "a tensor is missing",
        TORCH,
        resaved(RANK, lambda s: s["model"].pop("decoder.layers.1.mlp.linear_fc2.weight")),
        "layers.1.mlp.linear_fc2.weight is missing",
    ),
    (
        "a tensor of no one",
        TORCH,
        resaved(RANK, lambda s: s["model"].update(strange=pending(torch.ones(3)))),
        "strange is not a tensor of llama",
    ),
    (
        "a tensor of another shape",
        TORCH,
        resaved(RANK, lambda s: s["model"].update({"output_layer.weight": pending(torch.ones(9, 64))})),
        "output_layer.weight is [9, 64]",
    ),
    (
        "copies that differ",
        TORCH,
        resaved(
            IT + "mp_rank_01_000/model_optim_rng.pt",
            lambda s: s["model"].update(
                {"decoder.layers.0.input_layernorm.weight": pending(torch.full((64,), 3.0).bfloat16())}
            ),
        ),
        "differs from its copy",
    ),
    (
        "a rank of another dtype",
        TORCH,
        resaved(RANK, lambda s: s["model"].update({"output_layer.weight": pending(torch.ones(2560, 64))})),
        "output_layer.weight is bfloat16, and float32 in",
    ),
    (
        "an embedding that is tied, and another at its end",
        TORCH,
        lambda r: [
            resaved(f"{IT}mp_rank_{rank}/model_optim_rng.pt", tied)(r)
            for rank in ("00_000", "01_000", "00_001", "01_001")
        ],
        "output_layer.weight differs from its copy",
    ),
    ("no model in a file", TORCH, resaved(RANK, lambda s: s.pop("model")), "has no model"),
    ("no optimizer", TORCH, resaved(RANK, lambda s: s.update(optimizer=None)), "has no optimizer state"),
    (
        "optimizer buffers of another model",
        TORCH,
        resaved(IT + "mp_rank_00_001/distrib_optim.pt", lambda s: next(iter(s[0].values())).update(numel_unpadded=7)),
        "buffer 0 has 7 elements",
    ),
    ("optimizer buffers cut short", TORCH, cut(IT + "mp_rank_00_001/distrib_optim.pt"), "cut short"),
    ("malicious model_optim_rng.pt", TORCH, evil(RANK), "system, which could run code"),
    ("malicious distrib_optim.pt", TORCH, evil(IT + "mp_rank_00_001/distrib_optim.pt"), "system, which could run code"),
    ("no .metadata", DIST, gone(IT + ".metadata"), "no checkpoint that is known"),
    (".metadata cut short", DIST, cut(IT + ".metadata"), "pickle cannot be read"),
    (".metadata is something else", DIST, text(IT + ".metadata", pickle.dumps({"a": 1})), "is no metadata"),
    ("malicious .metadata", DIST, evil_pickle(IT + ".metadata"), "system, which could run code"),
    ("malicious common.pt", DIST, evil(IT + "common.pt"), "system, which could run code"),
    ("malicious chunk", DIST, evil_blob, "system, which could run code"),
    ("a .distcp is missing", DIST, gone(IT + "__1_0.distcp"), "__1_0.distcp: is not there"),
    ("a .distcp is cut short", DIST, cut(IT + "__1_0.distcp", 0.3), "the file is cut short"),
    ("no common.pt, no arguments", DIST, gone(IT + "common.pt"), "does not say what the model is"),
    (
        "arguments of another vocabulary",
        DIST,
        resaved(IT + "common.pt", lambda s: setattr(s["args"], "padded_vocab_size", 512)),
        "padded_vocab_size is 512",
    ),
    (
        "arguments of another size",
        DIST,
        resaved(IT + "common.pt", lambda s: setattr(s["args"], "ffn_hidden_size", 128)),
        "the model makes it [4, 256, 64]",
    ),
    (
        "arguments without a size",
        DIST,
        resaved(IT + "common.pt", lambda s: delattr(s["args"], "hidden_size")),
        "have no hidden_size",
    ),
    (
        "heads that groups do not divide",
        DIST,
        resaved(IT + "common.pt", lambda s: setattr(s["args"], "num_query_groups", 3)),
        "3 key-value heads do not divide 8",
    ),
    (
        "more layers than there are",
        DIST,
        resaved(IT + "common.pt", lambda s: setattr(s["args"], "num_layers", 5)),
        "the model makes it [5,",
    ),
    ("a zarr chunk is missing", ZARR, gone(f"{FC1}/2.1.0"), f"{FC1}/2.1.0: is not there"),
    ("a zarr chunk is cut short", ZARR, cut(f"{FC1}/2.1.0"), "a chunk has 22528"),
    (
        "a compressed zarr",
        ZARR,
        edited(f"{FC1}/.zarray", lambda s: s.update(compressor={"id": "blosc"})),
        "compressor is",
    ),
    ("safetensors cut short", HF, cut("model.safetensors"), "its header says"),
    ("safetensors of nothing", HF, text("model.safetensors", ""), "ends at byte 0"),
    ("no weights", HF, gone("model.safetensors"), "no checkpoint that is known"),
    ("config.json is no JSON", HF, text("config.json", "{"), "cannot be read as JSON"),
    (
        "config.json of another size",
        HF,
        edited("config.json", lambda c: c.update(intermediate_size=128)),
        "config.json makes it [128, 64]",
    ),
    (
        "config.json of another vocabulary",
        HF,
        edited("config.json", lambda c: c.update(vocab_size=999)),
        "config.json makes it [999, 64]",
    ),
    (
        "no output layer, and not tied",
        HF,
        without_tensor("lm_head.weight"),
        "lm_head.weight is missing",
    ),
    ("config.json without a size", HF, edited("config.json", lambda c: c.pop("hidden_size")), "has no hidden_size"),
    (
        "config.json with a word for a size",
        HF,
        edited("config.json", lambda c: c.update(hidden_size="big")),
        "is not a whole number",
    ),
    (
        "a family that is not known",
        HF,
        edited("config.json", lambda c: c.update(model_type="rwkv")),
        "'rwkv' is not known",
    ),
    (
        "more layers than there are, HF",
        HF,
        edited("config.json", lambda c: c.update(num_hidden_layers=5)),
        "model.layers.4",
    ),
    (
        "fewer layers than there are",
        HF,
        edited("config.json", lambda c: c.update(num_hidden_layers=3)),
        "is not a tensor of llama",
    ),
    (
        "tied, but two tensors",
        HF,
        edited("config.json", lambda c: c.update(tie_word_embeddings=True)),
        "differs from the embedding",
    ),
    ("quantized", HF, edited("config.json", lambda c: c.update(quantization_config={})), "are quantized"),
    (
        "an index to a missing file",
        HF,
        text("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "is not there",
    ),
    (
        "an index to another folder",
        HF,
        text("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'),
        "outside its folder",
    ),
    (
        "an index to a missing tensor",
        HF,
        text("model.safetensors.index.json", '{"weight_map": {"a": "model.safetensors"}}'),
        "does not have it",
    ),
    (
        "malicious pytorch_model.bin",
        HF,
        lambda r: (gone("model.safetensors")(r), evil("pytorch_model.bin")(r)),
        "system, which could run code",
    ),
]


@pytest.mark.parametrize("name, fixture, damage, said", CASES, ids=[case[0] for case in CASES])
def test_a_damaged_source(
    name: str,
    fixture: str,
    damage: Damage,
    said: str,
    copied: Callable[[str], Path],
    unpacked: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = copied(fixture)
    damage(source)
    config = None
    if fixture == ZARR:
        found = json.loads((unpacked(HF) / "config.json").read_text()) | {"vocab_size": 1024}
        config = tmp_path / "config.json"
        config.write_text(json.dumps(found))
    kinds = KINDS if fixture in (TORCH, DIST) else ("model",)
    with pytest.raises(UserError) as caught:
        convert(
            source,
            tmp_path / "out",
            "torch_dist",
            Options(config=config, optimizer=len(kinds) > 1),
            Target(kinds=kinds),
        )
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "out").exists() and not (source / "executed").exists()


REQUESTS: list[tuple[str, dict[str, Any], str]] = [
    ("tp that divides no heads", {"layout": Layout(tp=3)}, "tp=3 does not divide"),
    ("tp beyond the attention heads", {"layout": Layout(tp=16)}, "neither divides the 4 key-value heads"),
    ("pp that divides no layers", {"layout": Layout(pp=3)}, "pp * vpp = 3 does not divide 4 layers"),
    ("vpp without pp", {"layout": Layout(vpp=2)}, "vpp=2 with pp=1"),
    ("ep without experts", {"layout": Layout(ep=2)}, "the model has no experts"),
    ("stages of another sum", {"layout": Layout(pp=2, stages=(3, 3))}, "with 6 layers"),
    ("tp of zero", {"layout": Layout(tp=0)}, "tp=0 is not a size"),
    ("optimizer of a source without", {"kinds": KINDS}, "has no exp_avg"),
]


@pytest.mark.parametrize("name, wanted, said", REQUESTS, ids=[case[0] for case in REQUESTS])
def test_what_cannot_be_asked_for(
    name: str, wanted: dict[str, Any], said: str, unpacked: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        convert(unpacked(HF), tmp_path / "out", "torch", wanted=Target(**wanted))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_places(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    source = unpacked(HF)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "empty").mkdir()
    for at, path, target, to, said in [
        (1, source, tmp_path / "full", "torch", "is there already"),
        (2, source, source, "torch", "is the source"),
        (3, source, source / "inside", "torch", "is the source, or inside of it"),
        (4, tmp_path / "none", tmp_path / "out", "torch", "cannot be opened"),
        (5, tmp_path / "empty", tmp_path / "out", "torch", "is an empty folder"),
        (6, tmp_path / "full", tmp_path / "out", "torch", "is no checkpoint that is known"),
        (7, source, tmp_path / "out", "onnx", "cannot write onnx"),
        (8, source, tmp_path / "out", "zarr", "cannot write zarr"),
    ]:
        with pytest.raises(UserError) as caught:
            convert(path, target, to)
        assert said in str(caught.value), at
    assert not (tmp_path / "out").exists()


def test_a_full_disk(unpacked: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    monkeypatch.setattr(shutil, "disk_usage", lambda at: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match=r"are to be written, 0\.0 GB are free"):
        convert(unpacked(HF), tmp_path / "out", "torch")
    monkeypatch.undo()

    def full(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="the disk is full"):
            convert(unpacked(HF), tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
    convert(unpacked(HF), tmp_path / "out", "torch")


def test_a_manifest_tells_of_damage(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    convert(unpacked(HF), tmp_path / "out", "torch_dist")
    assert check_manifest(tmp_path / "out") == []
    file = tmp_path / "out/release/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (tmp_path / "out/release/common.pt").unlink()
    assert check_manifest(tmp_path / "out") == [
        "release/__0_0.distcp is damaged: its digest is not the manifest's",
        "release/common.pt is missing",
    ]
