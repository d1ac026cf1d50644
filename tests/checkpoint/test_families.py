"""Every family through every format and back: the files that transformers wrote come out equal to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nxdt_nemo.checkpoint import catalog, families
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dtypes import BFLOAT16
from nxdt_nemo.checkpoint.formats.base import Target
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.layout import Layout

MODELS = ["llama", "mistral", "mixtral", "qwen2", "qwen2 tied", "qwen3", "gemma", "bert", "bert before", "gpt2"]
ROUTES = [  # format, layout; ep of models with experts
    ("torch_dist", Layout(tp=2, pp=2), 2),
    ("torch_dist", Layout(tp=4, pp=2, stages=(1, 3)), 4),
    ("torch", Layout(tp=4, pp=2, vpp=2), 2),
    ("torch", Layout(tp=1, pp=4, stages=(0, 1, 2, 1)), 1),
    ("hf_bin", Layout(), 1),
]


def test_each_family_is_tried() -> None:
    """T5 is no model of transformers: test_t5.py."""
    assert {name.split()[0] for name in MODELS} | {"t5"} == set(families.NAMES)


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(model: str, hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_model(model)
    wanted, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    for number, (to, layout, ep) in enumerate(ROUTES):
        cut = Layout(layout.tp, layout.pp, layout.vpp, ep if model == "mixtral" else 1, stages=layout.stages)
        there, back = tmp_path / f"{number}", tmp_path / f"{number}.hf"
        convert(source, there, to, wanted=Target(cut))
        report = convert(there, back, "hf")
        assert report.source.family.name == model.split()[0]
        found = load_file(back / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], to
        said = json.loads((back / "config.json").read_text())
        differing = {
            key: said.get(key) for key, value in config.items() if value is not None and said.get(key) != value
        }
        assert differing.keys() <= {"transformers_version"}, differing


def test_what_a_rank_gets_is_what_the_formulas_say(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Megatron's shards, made by hand from Hugging Face's tensors: no code of ours but the writer."""
    source = hf_model("llama")
    hf = load_file(source / "model.safetensors")
    convert(source, tmp_path / "out", "torch", wanted=Target(Layout(tp=2, pp=2)))
    for tp in range(2):
        state = torch.load(tmp_path / f"out/release/mp_rank_{tp:02d}_001/model_optim_rng.pt", weights_only=False)
        model, layer = state["model"], "model.layers.3."
        q, k, v = (hf[f"{layer}self_attn.{one}_proj.weight"] for one in "qkv")
        groups = [torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8]]) for g in range(4)]
        assert torch.equal(
            model["decoder.layers.1.self_attention.linear_qkv.weight"], torch.cat(groups[2 * tp : 2 * tp + 2])
        )
        gate, up, down = (hf[f"{layer}mlp.{one}_proj.weight"] for one in ("gate", "up", "down"))
        rows = slice(48 * tp, 48 * tp + 48)
        assert torch.equal(model["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate[rows], up[rows]]))
        assert torch.equal(model["decoder.layers.1.mlp.linear_fc2.weight"], down[:, rows])
        head = torch.zeros(1024, 64)
        head[:1000] = hf["lm_head.weight"]
        assert torch.equal(model["output_layer.weight"], head[512 * tp : 512 * tp + 512])
        assert "embedding.word_embeddings.weight" not in model
        assert state["args"].padded_vocab_size == 1024 and state["args"].tensor_model_parallel_size == 2


@pytest.mark.parametrize("model", ["llama", "qwen2", "mixtral"])
def test_more_ranks_than_key_value_heads(model: str, hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    """8 ranks for 4 of them, as this backend trains: a rank's file has a copy, a distributed checkpoint none."""
    source = hf_model(model)
    wanted = load_file(source / "model.safetensors")
    for to in ("torch", "torch_dist", "nemo", "nemo2", "nemo_dist"):
        convert(source, tmp_path / to, to, wanted=Target(Layout(tp=8, pp=2)))
        convert(tmp_path / to, tmp_path / f"{to}.hf", "hf")
        found = load_file(tmp_path / f"{to}.hf/model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), to
    for rank in range(8):
        state = torch.load(tmp_path / f"torch/release/mp_rank_{rank:02d}_001/model_optim_rng.pt", weights_only=False)
        at, theirs = "decoder.layers.1.self_attention.linear_", "model.layers.3.self_attn."
        q, k, v, out = (wanted[f"{theirs}{one}_proj.weight"] for one in "qkvo")
        size, head = 8, rank // 2
        assert torch.equal(state["model"][at + "qkv.weight"], q[size * rank : size * rank + size])
        rows = slice(size * head, size * head + size)
        assert torch.equal(state["model"][at + "qkv.kv_weight"], torch.cat([k[rows], v[rows]]))
        assert torch.equal(state["model"][at + "proj.weight"], out[:, size * rank : size * rank + size])


@pytest.mark.parametrize("model", ["llama", "qwen2 tied", "gpt2", "bert"])
def test_names_before_megatron_core(model: str, hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_model(model)
    wanted = load_file(source / "model.safetensors")
    for number, layout in enumerate((Layout(tp=2, pp=2), Layout(tp=4, pp=2, vpp=2), Layout())):
        there = tmp_path / f"{number}"
        convert(source, there, "torch", wanted=Target(layout, extra={"spec": "legacy"}))
        convert(there, tmp_path / f"{number}.hf", "hf")
        found = load_file(tmp_path / f"{number}.hf/model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), layout
    state = torch.load(there / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
    assert set(state["language_model"]) >= {"embedding", "encoder"}
    assert "layers.0.self_attention.query_key_value.weight" in state["language_model"]["encoder"]


def test_a_tied_embedding_is_on_both_ends(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    convert(hf_model("gpt2"), tmp_path / "out", "torch", wanted=Target(Layout(tp=1, pp=2)))
    ranks = [
        torch.load(tmp_path / f"out/release/mp_rank_00_{pp:03d}/model_optim_rng.pt", weights_only=False)
        for pp in (0, 1)
    ]
    first, last = (rank["model"] for rank in ranks)
    assert torch.equal(first["embedding.word_embeddings.weight"], last["output_layer.weight"])


def test_sharded_files_and_an_index(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_model("qwen2")
    for to, suffix in (("hf", "safetensors"), ("hf_bin", "bin")):
        report = convert(source, tmp_path / to, to, wanted=Target(extra={"shard_size": 100_000}))
        assert len(list((tmp_path / to).glob(f"*.{suffix}"))) > 2
        assert not report.notes
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / to, torch_dtype=torch.float32)
        wanted = load_file(source / "model.safetensors")
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items() if key in wanted)


def test_a_cast(hf_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = hf_model("llama")
    convert(source, tmp_path / "out", "hf", wanted=Target(dtype=BFLOAT16))
    wanted, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[key], wanted[key].bfloat16()) for key in wanted)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("model", ["gpt2", "mixtral"])
def test_large_arrays_are_written_in_parts(
    model: str, hf_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed and fused ones too: as if a block were a kilobyte."""
    convert(hf_model(model), tmp_path / "there", "torch", wanted=Target(Layout(tp=4, pp=2)))
    monkeypatch.setattr(catalog, "_BLOCK", 1000)
    monkeypatch.setattr(torch_zip, "_WHOLE", 500)
    convert(tmp_path / "there", tmp_path / "again", "torch_dist", wanted=Target(Layout(tp=2)))
    convert(tmp_path / "again", tmp_path / "back", "hf", workers=9)
    wanted, found = load_file(hf_model(model) / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
