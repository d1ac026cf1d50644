"""NeMo's, NNM's and NxD's containers: through each and back to the bit, in layouts that move every kind of row."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dtypes import FLOAT32
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.output import check_manifest
from nxdt_nemo.errors import UserError

from .conftest import KINDS, assert_same, read

Unpacked = Callable[[str], Path]
XSER = {"xser": True}

CASES: list[tuple[str, str, str, Layout, dict[str, Any]]] = [
    ("hf_llama_tiny", "nemo", "nemo", Layout(tp=2, pp=2), {}),
    ("hf_llama_tiny", "nemo", "nemo", Layout(tp=2), {"single": True}),
    ("hf_llama_tiny", "nemo_dist", "nemo_dist", Layout(tp=1, pp=2), {}),
    ("hf_llama_tiny", "nemo2", "nemo2", Layout(tp=2), {}),
    ("hf_mixtral_tiny", "nemo2", "nemo2", Layout(tp=1, ep=2), {}),
    ("hf_llama_tiny", "ptl", "ptl", Layout(tp=2, pp=2), {"names": "core"}),
    ("hf_llama_tiny", "nnm", "ptl", Layout(tp=2, pp=1), {}),
    ("hf_llama_tiny", "nnm", "nnm", Layout(tp=2, pp=2, vpp=2), XSER),
    ("hf_llama_tiny", "nnm", "ptl", Layout(tp=1, pp=2, stages=(3, 1)), {"gqa_qkv": True}),
    ("hf_llama_tiny", "nxdt", "nxdt", Layout(tp=2, pp=2, vpp=2), XSER),
    ("hf_llama_tiny", "nxdt", "nxdt", Layout(tp=8), {"hw_backend": "trn1"}),
    ("hf_llama_tiny", "nxdt", "nxdt", Layout(tp=8), {"hw_backend": "trn2", "fuse_qkv": True}),
    ("hf_llama_tiny", "nxdt", "nxdt", Layout(tp=4), {"hw_backend": "trn1", "kv_multiplier": 2}),
    ("hf_llama_tiny", "nxdt", "nxdt", Layout(tp=4), {"style": "megatron"}),
    ("hf_mixtral_tiny", "nemo", "nemo", Layout(tp=2, ep=2), {"single": True}),
    ("hf_mixtral_tiny", "nxdt", "nxdt", Layout(tp=2, ep=2), XSER),
    ("hf_mixtral_tiny", "nxdt", "nxdt", Layout(tp=2, ep=2), {}),
    ("gpt2", "nemo", "nemo", Layout(tp=2, pp=2), {}),
    ("gpt2", "nemo", "nemo", Layout(tp=2, pp=2), {"weights": "file", "single": True}),
    ("gpt2", "ptl", "ptl", Layout(tp=2, pp=2), {}),
    ("gpt2", "nnm", "nnm", Layout(tp=2, pp=2, vpp=2), XSER),
    ("gpt2", "nxdt", "nxdt", Layout(tp=2, pp=2), {"style": "megatron"}),
    ("qwen2 tied", "nxdt", "nxdt", Layout(tp=2), {"fuse_qkv": True}),
    ("qwen3", "nemo_dist", "nemo_dist", Layout(tp=2), {}),
]
SLOW = {"qwen3", "qwen2 tied", "gpt2"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def rows() -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) if case[0] in SLOW else case for case in CASES]


@pytest.mark.parametrize("name, to, found_as, layout, extra", rows())
def test_there_and_back_to_the_bit(
    name: str, to: str, found_as: str, layout: Layout, extra: dict[str, Any], request: Any, tmp_path: Path
) -> None:
    hf = request.getfixturevalue("unpacked" if name.startswith("hf_") else "hf_model")(name)
    there = tmp_path / ("there.nemo" if extra.get("single") else "there")
    extra = {key: value for key, value in extra.items() if key != "single"}
    convert(hf, there, to, wanted=Target(layout, extra=extra))
    assert there.is_file() == (there.suffix == ".nemo")
    assert formats.find(there) == found_as
    assert check_manifest(there) == []
    convert(there, tmp_path / "back", "hf")
    first, last = weights(hf), weights(tmp_path / "back")
    assert first.keys() - last.keys() <= {"lm_head.weight"}
    for key, tensor in last.items():
        assert tensor.dtype == first[key].dtype and torch.equal(tensor, first[key]), key
    configs = [json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "back")]
    said = ("transformers_version", "torch_dtype", "n_inner", "n_ctx")
    for config in configs:
        for key in said:
            config.pop(key, None)
    assert {key: configs[1].get(key) for key in configs[0]} == configs[0]


STATES: list[tuple[str, Layout, dict[str, Any]]] = [
    ("nemo_dist", Layout(tp=1, pp=2), {}),
    ("ptl", Layout(tp=2, pp=1), {"names": "core"}),
    ("nnm", Layout(tp=1, pp=2, vpp=2), {"dp": 3}),
    ("nnm", Layout(tp=2, pp=1), {"dp": 2, "xser": True}),
    ("nxdt", Layout(tp=2, pp=2), {"dp": 3}),
    ("nxdt", Layout(tp=1, pp=2), {"dp": 2, "xser": True, "style": "megatron"}),
    ("nxdt", Layout(tp=8), {"dp": 2, "hw_backend": "trn1", "no_decay": "norm"}),
    ("nxdt", Layout(tp=4, pp=2), {"dp": 3, "hw_backend": "trn2", "kv_multiplier": 2, "fuse_qkv": True}),
]


def state_rows() -> list[Any]:
    return [
        case if number in (0, 2) else pytest.param(*case, marks=pytest.mark.slow) for number, case in enumerate(STATES)
    ]


@pytest.mark.parametrize("to, layout, extra", state_rows())
def test_optimizer_state_goes_along(
    to: str, layout: Layout, extra: dict[str, Any], unpacked: Unpacked, tmp_path: Path
) -> None:
    """From Megatron's distributed optimizer, and back into another layout of it."""
    source = unpacked("ll_td_tp2pp2")
    convert(source, tmp_path / "there", to, wanted=Target(layout, kinds=KINDS, extra=extra))
    first, middle = read(source), read(tmp_path / "there")
    assert assert_same(first, middle) == 4 * 39
    assert middle.training.step == 2.0 and middle.training.iteration == 2
    assert {group["weight_decay"] for group in middle.training.groups} == {0.0, 0.01}
    convert(tmp_path / "there", tmp_path / "back", "torch_dist", wanted=Target(Layout(tp=2), kinds=KINDS))
    assert assert_same(first, read(tmp_path / "back")) == 4 * 39


@pytest.mark.parametrize("to", ["nxdt", "torch"])
def test_each_parameter_has_its_own_step(to: str, unpacked: Unpacked, tmp_path: Path) -> None:
    """torch's optimizers add to it in place: one tensor for all would count a step as often as there are parameters."""
    convert(unpacked("ll_td_tp2pp2"), tmp_path / "there", to, wanted=Target(Layout(), kinds=KINDS))
    steps = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            steps.extend(value[key].data_ptr() for key in value if key == "step" and torch.is_tensor(value[key]))
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            walk(inner)

    for path in (tmp_path / "there").rglob("*"):
        if path.suffix in (".pt", ".ckpt"):
            walk(torch.load(path, weights_only=False))
    assert len(steps) > 20 and len(set(steps)) == len(steps)


def test_a_nemo_file_is_what_nemo_packs(unpacked: Unpacked, tmp_path: Path) -> None:
    """Names as `tar.add(folder, arcname=".")` gives them, the tokenizer under a hash that the configuration names."""
    hf = tmp_path / "hf"
    hf.mkdir()
    for path in unpacked("hf_llama_tiny").iterdir():
        (hf / path.name).write_bytes(path.read_bytes())
    (hf / "tokenizer.model").write_bytes(b"pieces")
    convert(hf, tmp_path / "model.nemo", "nemo", wanted=Target(Layout(tp=2), FLOAT32))
    with tarfile.open(tmp_path / "model.nemo", "r:") as tar:
        names = tar.getnames()
        config = yaml.safe_load(tar.extractfile("./model_config.yaml").read())  # type: ignore[union-attr]
        tokenizer = config["tokenizer"]["model"].removeprefix("nemo:")
        assert tar.extractfile(f"./{tokenizer}").read() == b"pieces"  # type: ignore[union-attr]
    assert {"./model_weights/.metadata", "./model_weights/common.pt", "./model_weights/metadata.json"} <= set(names)
    assert (config["precision"], config["megatron_amp_O2"], config["mcore_gpt"]) == (32, False, True)
    assert config["tensor_model_parallel_size"] == 2 and config["num_query_groups"] == 4
    convert(tmp_path / "model.nemo", tmp_path / "other", "nemo")
    assert (tmp_path / "other" / tokenizer).read_bytes() == b"pieces"
    convert(tmp_path / "model.nemo", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize(
    "hardware, heads, keys",
    [  # docs of neuronx_distributed: 8 query heads, 4 key-value heads, 8 ranks
        ("trn1", [0, 2, 4, 6, 1, 3, 5, 7], [0, 1, 2, 3, 0, 1, 2, 3]),
        ("trn2", [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_copied_heads_lie_as_the_hardware_has_them(
    hardware: str, heads: list[int], keys: list[int], unpacked: Unpacked, tmp_path: Path
) -> None:
    hf = unpacked("hf_llama_tiny")
    convert(hf, tmp_path / "to", "nxdt", wanted=Target(Layout(tp=8), extra={"hw_backend": hardware}))
    whole = weights(hf)
    queries = whole["model.layers.1.self_attn.q_proj.weight"].split(8)
    values = whole["model.layers.1.self_attn.v_proj.weight"].split(8)
    out = whole["model.layers.1.self_attn.o_proj.weight"].split(8, dim=1)
    for rank in range(8):
        at = tmp_path / f"to/model/dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt"
        state = torch.load(at, weights_only=True)
        layer = "model.layers.1.self_attn."
        assert torch.equal(state[layer + "qkv_proj.weight_q"], queries[heads[rank]])
        assert torch.equal(state[layer + "qkv_proj.weight_v"], values[keys[rank]])
        assert torch.equal(state[layer + "o_proj.weight"], out[heads[rank]])


@pytest.mark.parametrize("hardware, other", [("trn1", "trn2"), ("trn2", "trn1")])
def test_the_order_of_copies_without_our_note(hardware: str, other: str, unpacked: Unpacked, tmp_path: Path) -> None:
    """trn2's is found. trn1's could be NxD's converter's for trn2, whose queries lie otherwise: the user has to say."""
    there = tmp_path / "there"
    convert(unpacked("hf_llama_tiny"), there, "nxdt", wanted=Target(Layout(tp=8), extra={"hw_backend": hardware}))
    (there / "user_content.pt").unlink()
    if hardware == "trn1":
        with pytest.raises(UserError, match="nothing says for which hardware"):
            formats.read(there, Options())
    source = formats.read(there, Options(extra={"hw_backend": "trn1"} if hardware == "trn1" else {}))
    assert (source.detail["hw_backend"], source.detail["kv_multiplier"]) == (hardware, 2)
    with pytest.raises(UserError, match=f"keys are placed as for {hardware}"):
        formats.read(there, Options(extra={"hw_backend": other}))
