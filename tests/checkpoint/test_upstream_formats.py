"""What NeMo, NNM and NxD wrote is read, and they read what we write. Their sources: NXDT_NXD_SOURCE, NXDT_NNM_SOURCE.

Each runs in a process of its own, unchanged; upstream/*.py say what is stubbed. NxD's converter is wrong for trn2 with
copies of heads: it places keys as for trn1 and queries in order, which our reader refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dtypes import FLOAT32
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.upstream]
HERE = Path(__file__).with_name("upstream")
NXD, NNM = os.environ.get("NXDT_NXD_SOURCE", ""), os.environ.get("NXDT_NNM_SOURCE", "")
Unpacked = Callable[[str], Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        rows = second[key][: len(tensor)]  # upstream may keep rows that pad a vocabulary
        assert tensor.dtype == rows.dtype and torch.equal(tensor, rows), key


def upstream(script: str, *arguments: Any, stubs: str = "") -> None:
    command = [str(HERE / "stubs.py"), stubs, str(HERE / script)] if stubs else [str(HERE / script)]
    environment = {**os.environ, "NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=550,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture
def work(unpacked: Unpacked, tmp_path: Path) -> Path:
    """A folder with a Llama as upstream's converters want it: full.pt, hf/pytorch_model.bin, config.json."""
    hf = unpacked("hf_llama_tiny")
    (tmp_path / "hf").mkdir()
    (tmp_path / "read").mkdir()
    for name in ("full.pt", "hf/pytorch_model.bin"):
        torch.save(weights(hf), tmp_path / name)
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    return tmp_path


@pytest.mark.skipif(not NXD, reason="NXDT_NXD_SOURCE names no checkout of neuronx-distributed")
def test_nxd(work: Path, unpacked: Unpacked) -> None:
    hf = unpacked("hf_llama_tiny")
    convert(hf, work / "ours/trn1", "nxdt", wanted=Target(Layout(tp=8, pp=2), extra={"hw_backend": "trn1"}))
    convert(hf, work / "ours/xser", "nxdt", wanted=Target(Layout(tp=4, pp=2), extra={"xser": True}))
    upstream("nxd.py", work, stubs=f"{NXD}/src")
    full = weights(hf)
    for name in ("trn1", "xser"):
        assert_equal(full, torch.load(work / "read" / name / "checkpoint.pt"))
    for name in ("trn1", "fused", "xser"):
        said = Options(config=work / "config.json", extra={"hw_backend": "trn1"})
        convert(work / "theirs" / name / "model", work / "back" / name, "hf", said)
        assert_equal(full, weights(work / "back" / name))
    said = Options(config=work / "config.json", extra={"hw_backend": "trn2"})
    with pytest.raises(UserError, match="NxD's converter does so for trn2"):
        convert(work / "theirs/trn2/model", work / "back/trn2", "hf", said)
    for path in (work / "theirs/trn1/model").iterdir():  # file by file: names, keys, shapes, values
        mine = torch.load(work / "ours/trn1/model" / path.name)
        assert_equal(torch.load(path), mine)
    rank = torch.load(work / "read/rank.pt")
    assert torch.equal(rank["model.norm.weight"], full["model.norm.weight"])


@pytest.mark.skipif(not NNM, reason="NXDT_NNM_SOURCE names no checkout of neuronx-nemo-megatron")
def test_nnm(work: Path, unpacked: Unpacked) -> None:
    hf = unpacked("hf_llama_tiny")
    for name, extra in (("split", {}), ("fused", {"gqa_qkv": True}), ("xser", {"gqa_qkv": True, "xser": True})):
        wanted = Target(Layout(tp=2, pp=2), divisible_by=4, extra=extra)
        convert(hf, work / "ours" / name, "nnm", wanted=wanted)
    upstream("nnm.py", NNM, work, stubs=NNM)
    full = weights(hf)
    for name in ("split", "fused", "xser"):
        assert_equal(full, torch.load(work / "read" / name / "pytorch_model.bin"))
    for name in ("split", "fused_xser"):
        convert(work / "theirs" / name, work / "back" / name, "hf", Options(config=work / "config.json"))
        assert_equal(full, weights(work / "back" / name))


def test_nemo(unpacked: Unpacked, tmp_path: Path) -> None:
    """restore_from and save_to of `.nemo` (distributed, and NeMo's own GPT), a training checkpoint, a PTL file."""
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    core, legacy = tmp_path / "core", tmp_path / "multi_head"
    tokenizer = _tokenizer(tmp_path)
    for folder in (core, legacy):
        folder.mkdir()
        for path in unpacked("hf_llama_tiny").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "tokenizer.model").write_bytes(tokenizer)
    _multi_head(legacy)
    float32 = Target(Layout(), FLOAT32)
    convert(core, tmp_path / "dist.nemo", "nemo", wanted=float32)
    convert(core, tmp_path / "train", "nemo_dist", wanted=float32)
    by_file = Target(Layout(), FLOAT32, extra={"weights": "file"})
    convert(legacy, tmp_path / "legacy.nemo", "nemo", wanted=by_file)
    convert(legacy, tmp_path / "ptl", "ptl", wanted=float32)
    upstream("restore_nemo.py", tmp_path)
    for saved, source in (("saved.nemo", core), ("legacy_saved.nemo", legacy)):
        convert(tmp_path / saved, tmp_path / "back" / saved, "hf")
        full = {key: tensor.float() for key, tensor in weights(source).items()}
        assert_equal(full, weights(tmp_path / "back" / saved))
    convert(core, tmp_path / "torch", "torch", wanted=float32)
    state = torch.load(tmp_path / "torch/release/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    for name in ("dist", "train"):  # what megatron-core's own modules were given
        assert_equal({f"model.{key}": tensor for key, tensor in state.items()}, torch.load(tmp_path / f"{name}.pt"))
    assert_equal(torch.load(tmp_path / "legacy.pt"), torch.load(tmp_path / "ptl.pt"))


def _tokenizer(folder: Path) -> bytes:
    """A SentencePiece model of 1,000 pieces."""
    from pydoc_data.topics import topics

    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ") for text in topics.values()][:20]),
        model_prefix=str(folder / "pieces"),
        vocab_size=1000,
        model_type="bpe",
        max_sentence_length=1 << 18,
        minloglevel=2,
    )
    return (folder / "pieces.model").read_bytes()


def _multi_head(folder: Path) -> None:
    """The Llama with a key and a value head for each query head, which NeMo's own GPT wants."""
    from safetensors.torch import save_file

    (path,) = folder.glob("*.safetensors")
    full = load_file(path)
    for key, tensor in full.items():
        if key.endswith(("k_proj.weight", "v_proj.weight")):
            full[key] = torch.cat([tensor, tensor.flip(0)])
    save_file(full, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": config["num_attention_heads"]}))
