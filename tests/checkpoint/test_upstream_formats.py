"""What NeMo, NNM and NxD wrote is read, and they read what we write. Their sources: NXDT_NXD_SOURCE, NXDT_NNM_SOURCE.

Each runs in a process of its own, unchanged; upstream/*.py say what is stubbed. NxD's converter is wrong for trn2 with
copies of heads: it places keys as for trn1 and queries in order, which our reader refuses.
"""

from __future__ import annotations

import json
import os
import shutil
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

from . import conftest
from .conftest import KINDS, assert_same, read

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


def upstream(script: str, *arguments: Any, stubs: str = "", **variables: str) -> None:
    command = [str(HERE / "stubs.py"), stubs, str(HERE / script)] if stubs else [str(HERE / script)]
    environment = {**os.environ, "NXDT_NEMO_RUNTIME": "cpu", "NXDT_NEMO": "0", "OMP_NUM_THREADS": "1", **variables}
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


@pytest.mark.skipif(not NXD, reason="NXDT_NXD_SOURCE names no checkout of neuronx-distributed")
def test_nxd_zero1(unpacked: Unpacked, tmp_path: Path) -> None:
    """NeuronZero1Optimizer and load_checkpoint take optim/ of 1 and of 3 ranks, and save it again."""
    source, ranks = unpacked("ll_td_tp2pp2"), 3
    for name, count in (("one", 1), ("many", ranks)):
        convert(source, tmp_path / "ours" / name, "nxdt", wanted=Target(Layout(), kinds=KINDS, extra={"dp": count}))
    upstream("nxd_zero1.py", tmp_path, ranks, stubs=f"{NXD}/src", NXDT_TEST_XLA="1", PJRT_DEVICE="CPU")
    first, theirs = read(source), tmp_path / "theirs"
    for name in ("one", "many", "stepped"):
        shutil.copytree(tmp_path / "ours/one/model", theirs / name / "model", dirs_exist_ok=True)
        shutil.copy(tmp_path / "ours/one/user_content.pt", theirs / name)
    for name in ("one", "many"):
        assert assert_same(first, read(theirs / name)) == 4 * 39
    stepped = read(theirs / "stepped")
    assert stepped.training.step == 3.0
    for name in first.catalog.names("exp_avg"):
        wanted = conftest.tensor(first, "exp_avg", name) * 0.9 + 0.1 * 2**-10
        torch.testing.assert_close(conftest.tensor(stepped, "exp_avg", name), wanted, rtol=1e-5, atol=1e-9)
        before, after = (conftest.tensor(side, "fp32_param", name) for side in (first, stepped))
        assert not torch.equal(before, after)
    slices = [theirs / f"many/optim/dp_rank_{rank:02d}_tp_rank_00_pp_rank_00.pt" for rank in (0, 1)]
    exchanged = [path.read_bytes() for path in slices]
    for path, content in zip(slices, reversed(exchanged), strict=True):
        path.write_bytes(content)
    with pytest.raises(AssertionError):
        assert_same(first, read(theirs / "many"))


@pytest.mark.skipif(not NXD, reason="NXDT_NXD_SOURCE names no checkout of neuronx-distributed")
def test_nxd_converts_zero1(unpacked: Unpacked, tmp_path: Path) -> None:
    """Its script takes 3 ranks for 2; of the main weights it writes the first rank's slice alone, which is refused."""
    source = unpacked("ll_td_tp2pp2")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert(source, ours, "nxdt", wanted=Target(Layout(tp=2, pp=2), kinds=KINDS, extra={"dp": 3}))
    shutil.copytree(ours, theirs, ignore=shutil.ignore_patterns("optim"))
    script = f"{NXD}/src/neuronx_distributed/optimizer/convert_zero_checkpoints.py"
    words = ("--input_dir", ours, "--output_dir", theirs, "--dp_size", 2, "--convert_to_sharded")
    upstream(script, *words, stubs=f"{NXD}/src")
    with pytest.raises(UserError, match="fp32_param of"):
        read(theirs)
    for path in (theirs / "optim").iterdir():
        state = torch.load(path, weights_only=False)
        del state["sharded_master_weights"]
        torch.save(state, path)
    assert assert_same(read(source), read(theirs), ("exp_avg", "exp_avg_sq")) == 2 * 39


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


LAYOUT = ("tensor_model_parallel_size", "expert_tensor_parallel_size")
# Where a configuration of ours, for two tensor-parallel ranks, is not that of NeMo's importer, which takes a window for
# the longest sequence, and for one key too many.
OTHERWISE = {
    "llama": {*LAYOUT},
    "mistral": {"window_size", "seq_length", *LAYOUT},
}


def test_nemo2(hf_model: Unpacked, tmp_path: Path) -> None:
    """io.load_context and llm.export_ckpt of a folder of ours, beside the one that llm.import_ckpt makes."""
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    for family in OTHERWISE:
        shutil.copytree(hf_model(family), tmp_path / family / "hf")
        _hugging_face_tokenizer(tmp_path / family / "hf")
        convert(tmp_path / family / "hf", tmp_path / family / "ours", "nemo2", wanted=Target(Layout(tp=2)))
    upstream("nemo2.py", tmp_path, *OTHERWISE)
    for family, otherwise in OTHERWISE.items():
        folder = tmp_path / family
        assert json.loads((folder / "differs.json").read_text()).keys() == otherwise
        full = weights(folder / "hf")
        assert_equal(full, weights(folder / "hf_again"))
        convert(folder / "theirs", folder / "back", "hf")
        assert_equal(full, weights(folder / "back"))


def _hugging_face_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 1,000 pieces, beside a model of as many."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(
        list(topics.values())[:40], 1000, special_tokens=[*special.values()], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=tokens._tokenizer, **special).save_pretrained(folder)


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
