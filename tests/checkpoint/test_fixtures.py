"""What upstream wrote: read right, and through other layouts and back to the bit."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nxdt_nemo.checkpoint import catalog, formats
from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.dtypes import FLOAT32, same
from nxdt_nemo.checkpoint.formats.base import Options, Target
from nxdt_nemo.checkpoint.layout import Layout

from .conftest import DATA, KINDS, assert_same, read, tensor

Unpacked = Callable[[str], Path]


def zarr_options(unpacked: Unpacked, folder: Path) -> Options:
    """zarr_tp1 says nothing of its model: a config.json in `folder` does."""
    config = json.loads((unpacked("hf_llama_tiny") / "config.json").read_text()) | {"vocab_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return Options(config=folder / "config.json")


OTHERS = ("t5", "zarr_tp2")  # Hugging Face has none; two layers are no four stages
FIXTURES = sorted(
    file.name.removesuffix(".tar.xz") for file in DATA.glob("*.tar.xz") if not file.name.startswith(OTHERS)
)


@pytest.mark.parametrize("name", FIXTURES)
def test_each_goes_through_hugging_face_and_two_layouts_and_back(name: str, unpacked: Unpacked, tmp_path: Path) -> None:
    """Weights to the bit, in each place and at the end of the way."""
    options = zarr_options(unpacked, tmp_path) if name == "zarr_tp1" else Options()
    source = formats.read(unpacked(name), options)
    own = Layout(tp=2, pp=2)
    for number, (to, layout) in enumerate((("hf", Layout()), ("torch", Layout(tp=4)), ("torch_dist", Layout(pp=4)))):
        there, back = tmp_path / f"there{number}", tmp_path / f"back{number}"
        convert(source.path, there, to, options, Target(layout))
        convert(there, back, "torch_dist", wanted=Target(own))
        for place in (there, back):
            assert assert_same(source, read(place, optimizer=False), ("model",)) == len(source.catalog.names())


def test_two_formats_of_one_run_are_the_same(unpacked: Unpacked) -> None:
    """Megatron-LM wrote the same run twice: flat buffers without names, and tiles of named tensors."""
    sharded, named = read(unpacked("ll_torch_tp2pp2_do")), read(unpacked("ll_td_tp2pp2"))
    assert (sharded.format, named.format) == ("torch", "torch_dist")
    assert assert_same(sharded, named) == 4 * 39
    assert sharded.model == named.model
    assert sharded.training.step == named.training.step == 2.0
    assert sharded.training.consumed == named.training.consumed == 8


@pytest.mark.parametrize("name", ["ll_torch_tp2pp2_do", "ll_td_tp2pp2"])
def test_main_parameters_are_the_weights(name: str, unpacked: Unpacked) -> None:
    """An invariant of upstream's training, which a misplaced row of either would break."""
    source = read(unpacked(name))
    for weight in source.catalog.names():
        assert torch.equal(tensor(source, "fp32_param", weight).bfloat16(), tensor(source, "model", weight)), weight


LAYOUTS = [
    ("torch", Layout(tp=4, pp=2, vpp=2), {}),
    ("torch", Layout(tp=1, pp=2, stages=(3, 1)), {"spec": "te"}),
    ("torch", Layout(tp=2, pp=2, vpp=2), {"optimizer_format": "distrib_optim", "dp": 4}),
    ("torch_dist", Layout(tp=4, pp=1), {}),
    ("torch_dist", Layout(tp=1, pp=4), {"optimizer_format": "model_space"}),
]


@pytest.mark.parametrize("name", ["ll_torch_tp2pp2_do", "ll_td_tp2pp2"])
@pytest.mark.parametrize("to, layout, extra", LAYOUTS)
def test_with_optimizer_through_another_layout_and_back(
    name: str, to: str, layout: Layout, extra: dict[str, str], unpacked: Unpacked, tmp_path: Path
) -> None:
    source = unpacked(name)
    convert(source, tmp_path / "there", to, wanted=Target(layout, kinds=KINDS, extra=extra))
    convert(tmp_path / "there", tmp_path / "back", "torch_dist", wanted=Target(Layout(tp=2, pp=2), kinds=KINDS))
    first, middle, last = read(source), read(tmp_path / "there"), read(tmp_path / "back")
    assert assert_same(first, middle) == assert_same(first, last) == 156
    for found in (middle, last):
        assert found.training.step == 2.0 and found.training.iteration == 2 and found.training.consumed == 8
        assert len(found.training.groups) >= 2
        assert {group["weight_decay"] for group in found.training.groups} == {0.0, 0.01}


def test_the_files_of_upstream_come_back_to_the_bit(unpacked: Unpacked, tmp_path: Path) -> None:
    """At its own layout each chunk of each tensor is upstream's, in shape, place and bytes."""
    from nxdt_nemo.checkpoint.formats.torch_dist import items_of
    from nxdt_nemo.checkpoint.io.files import Files

    source = unpacked("ll_td_tp2pp2")
    convert(source, tmp_path / "out", "torch_dist", wanted=Target(Layout(tp=2, pp=2), kinds=KINDS))
    theirs = items_of(source / "iter_0000002", Files())
    ours = items_of(tmp_path / "out/iter_0000002", Files())
    assert theirs.keys() == ours.keys()
    for key, item in theirs.items():
        assert item.shape == ours[key].shape and item.dtype == ours[key].dtype
        boxes = dict(ours[key].chunks)
        assert boxes.keys() == {box for box, _ in item.chunks}
        for box, array in item.chunks:
            assert same(array.extent.tensor(), boxes[box].extent.tensor()), (key, box)


@pytest.mark.parametrize("block", [catalog._BLOCK, 2000])
@pytest.mark.parametrize("name", ["ll_torch_tp2pp2_do", "ll_td_tp2pp2"])
def test_the_buffers_of_the_distributed_optimizer_come_back_to_the_bit(
    name: str, block: int, unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Megatron-LM's own distrib_optim.pt, each flat buffer with its gaps; made of the other format's tiles too.

    Its second rank's copies of norms have drifted from the first's, which are the ones that are taken.
    """
    monkeypatch.setattr(catalog, "_BLOCK", block)  # bytes: parameters larger than that can be made in parts
    extra = {"optimizer_format": "distrib_optim"}
    convert(unpacked(name), tmp_path / "out", "torch", wanted=Target(Layout(tp=2, pp=2), kinds=KINDS, extra=extra))
    norms = {"mp_rank_00_000": 0, "mp_rank_00_001": 0, "mp_rank_01_000": 4 * 64, "mp_rank_01_001": 5 * 64}
    for rank, drifted in norms.items():
        theirs, ours = (
            torch.load(root / "iter_0000002" / rank / "distrib_optim.pt", weights_only=True)
            for root in (unpacked("ll_torch_tp2pp2_do"), tmp_path / "out")
        )
        assert ours["buckets_coalesced"] is theirs["buckets_coalesced"] is True
        assert ours[0].keys() == theirs[0].keys() == {(torch.bfloat16, torch.float32)}
        (one,), (other,) = ours[0].values(), theirs[0].values()
        assert one.pop("numel_unpadded") == other.pop("numel_unpadded") == len(one["param"])
        assert one.keys() == other.keys() == {"param", "exp_avg", "exp_avg_sq"}
        assert {int((one[key] != other[key]).sum()) for key in other} == {drifted}
    with zipfile.ZipFile(tmp_path / "out/iter_0000002/mp_rank_00_001/distrib_optim.pt") as archive:
        assert archive.testzip() is None


def test_the_metadata_is_what_torch_itself_would_write(unpacked: Unpacked, tmp_path: Path) -> None:
    """Classes and fields, read by DCP; ours is written without torch."""
    from torch.distributed.checkpoint import FileSystemReader, metadata

    source = unpacked("ll_td_tp2pp2")
    convert(source, tmp_path / "out", "torch_dist", wanted=Target(Layout(tp=2, pp=2), kinds=KINDS))
    theirs, ours = (FileSystemReader(at / "iter_0000002").read_metadata() for at in (source, tmp_path / "out"))
    assert type(ours) is metadata.Metadata and vars(ours).keys() >= vars(theirs).keys() - {"all_local_plans"}
    for key, entry in ours.state_dict_metadata.items():
        wanted = theirs.state_dict_metadata[key]
        assert type(entry) is type(wanted)
        if isinstance(entry, metadata.TensorStorageMetadata):
            assert (entry.properties, entry.size) == (wanted.properties, wanted.size)
            assert type(entry.size) is torch.Size and type(entry.chunks[0].offsets) is torch.Size
            assert sorted(map(repr, entry.chunks)) == sorted(map(repr, wanted.chunks))
    tensors = {index for index in theirs.storage_data if index.offset is not None}
    assert tensors == {index for index in ours.storage_data if index.offset is not None}
    assert {type(info) for info in ours.storage_data.values()} == {type(next(iter(theirs.storage_data.values())))}


def test_mixtral_of_a_rank_each_for_dense_and_expert_layers(unpacked: Unpacked, tmp_path: Path) -> None:
    """TP 2 x EP 2 with whole experts: two files, not four."""
    source = read(unpacked("mx_torch_tp2ep2"), optimizer=False)
    assert source.family.name == "mixtral" and source.model.experts == 4
    assert source.detail["ranks"] == ["mp_rank_00_000", "mp_rank_01_001"]
    for number, (to, layout) in enumerate(
        [("torch", Layout(2, 2, 1, 2)), ("torch_dist", Layout(4, 2, 1, 4)), ("torch", Layout(2, 1, 1, 2, etp=1))]
    ):
        convert(source.path, tmp_path / str(number), to, wanted=Target(layout))
        assert_same(source, read(tmp_path / str(number), optimizer=False), ("model",))
    assert len(list((tmp_path / "2/iter_0000002").iterdir())) == 2
    convert(source.path, tmp_path / "hf", "hf")
    found = load_file(tmp_path / "hf/model.safetensors")
    state = torch.load(source.path / "mp_rank_01_001/model_optim_rng.pt", weights_only=False)["model"]
    fused = state["decoder.layers.2.mlp.experts.local_experts.1.linear_fc1.weight"]
    assert torch.equal(found["model.layers.2.block_sparse_moe.experts.3.w1.weight"], fused[:96])
    assert torch.equal(found["model.layers.2.block_sparse_moe.experts.3.w3.weight"], fused[96:])


def test_zarr_as_zarr_itself_reads_it(unpacked: Unpacked, tmp_path: Path) -> None:
    folder = unpacked("zarr_tp1")
    options = zarr_options(unpacked, tmp_path)
    source = formats.read(folder, options)
    assert (source.format, source.family.name, len(source.catalog.names())) == ("zarr", "llama", 39)
    import tensorstore

    def stored(key: str) -> torch.Tensor:
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / key)}}
        return torch.from_numpy(tensorstore.open(spec).result().read().result().astype("float32"))

    fc1 = stored("decoder.layers.mlp.linear_fc1.weight")
    assert torch.equal(tensor(source, "model", "layers.2.mlp.gate.weight").float(), fc1[2, :176])
    assert torch.equal(tensor(source, "model", "layers.3.mlp.up.weight").float(), fc1[3, 176:])
    qkv = stored("decoder.layers.self_attention.linear_qkv.weight").view(4, 4, 4, 8, 64)
    assert torch.equal(tensor(source, "model", "layers.1.attention.k.weight").float(), qkv[1, :, 2].reshape(32, 64))
    convert(folder, tmp_path / "hf", "hf", options)
    assert len(load_file(tmp_path / "hf/model.safetensors")) == 39


def test_zarr_with_optimizer_state(unpacked: Unpacked, tmp_path: Path) -> None:
    """Of megatron-core's distributed optimizer, whose ranks leave lock files beside what they write in turn."""
    folder = unpacked("zarr_tp2_do")
    source = read(folder)
    assert (source.format, source.training.step, source.training.consumed) == ("zarr", 2.0, 8)
    assert list(folder.glob("*/optimizer.state.exp_avg.*.sync"))
    import tensorstore

    for kind in KINDS[1:]:
        at = next(folder.glob(f"*/optimizer.state.{kind}.decoder.layers.mlp.linear_fc1.weight"))
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(at)}}
        fc1 = torch.from_numpy(tensorstore.open(spec).result().read().result())
        halves = [tensor(source, kind, f"layers.1.mlp.{one}.weight") for one in ("gate", "up")]
        assert torch.equal(torch.cat(halves), fc1[1]) and fc1[1].any()
    for to, layout in (("torch_dist", Layout(pp=2)), ("torch", Layout(tp=4))):  # two ranks have padding alone
        convert(folder, tmp_path / to, to, wanted=Target(layout, kinds=KINDS))
        assert assert_same(source, read(tmp_path / to)) == 4 * 21


@pytest.mark.parametrize("name", ["hf_llama_tiny", "hf_mixtral_tiny"])
def test_hugging_face_folders_with_their_tokenizer(name: str, unpacked: Unpacked, tmp_path: Path) -> None:
    source = unpacked(name)
    wanted = load_file(source / "model.safetensors")
    for number, (to, layout) in enumerate([("torch_dist", Layout(tp=2, pp=2)), ("torch", Layout(tp=4, pp=1))]):
        convert(source, tmp_path / f"{number}", to, wanted=Target(layout))
        convert(tmp_path / f"{number}", tmp_path / f"{number}.hf", "hf")
        found = load_file(tmp_path / f"{number}.hf/model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        for asset in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / f"{number}.hf" / asset).read_bytes() == (source / asset).read_bytes()


def test_a_float32_copy_is_made_of_the_main_parameters(unpacked: Unpacked, tmp_path: Path) -> None:
    convert(unpacked("ll_td_tp2pp2"), tmp_path / "out", "torch", wanted=Target(dtype=FLOAT32, kinds=KINDS))
    first, second = read(unpacked("ll_td_tp2pp2")), read(tmp_path / "out")
    assert second.catalog.kinds() == {"model", "exp_avg", "exp_avg_sq"}
    for name in first.catalog.names():
        assert torch.equal(tensor(first, "fp32_param", name), tensor(second, "model", name))
        assert torch.equal(tensor(first, "exp_avg", name), tensor(second, "exp_avg", name))
