"""LoRA: what NeMo's fine-tuning saves and what Hugging Face's `peft` loads, read, written, and merged into a model.

Room checkpoint/ (leaf). An adapter is, for some weights W [out, in] of the vocabulary, an A [rank, in] and a B
[out, rank]; the tuned weight is W + alpha / rank * B A. NeMo keeps those of a tensor-parallel rank in a file of its
own, cut and fused as the rank's layers are (nemo.collections.nlp.modules.common.megatron.adapters); its own
merge_lora_weights/merge.py leaves alpha out. May import numpy, yaml and this room.
Proof: tests/checkpoint/test_adapters.py, tests/tools/test_demo_finetune.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nxdt_nemo.checkpoint.boxes import Box, whole
from nxdt_nemo.checkpoint.catalog import Block, Catalog
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType, Raw, cast
from nxdt_nemo.checkpoint.formats import hf
from nxdt_nemo.checkpoint.formats.base import Source, constant
from nxdt_nemo.checkpoint.formats.nemo import CONFIG, PER_RANK, read_yaml
from nxdt_nemo.checkpoint.io import safetensors, torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.io.tar import Tree
from nxdt_nemo.checkpoint.output import Folder
from nxdt_nemo.checkpoint.tensors import logical_of
from nxdt_nemo.errors import UserError

__all__ = ["Adapter", "merge_into", "read", "write_peft"]

PEFT, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight")
_NEMO_KEY = re.compile(r"model\.(?:module\.)?decoder\.layers\.(\d+)\.(.+)\.linear_(in|out)\.weight")
_ATTENTION, _MLP = "self_attention.adapter_layer.", "mlp.adapter_layer."
# NeMo's adapters of one projection: what they adapt; and whether their input is cut between ranks.
_SINGLE = {
    f"{_ATTENTION}lora_unfused_kqv_adapter.q_adapter": ("attention.q", False),
    f"{_ATTENTION}lora_unfused_kqv_adapter.k_adapter": ("attention.k", False),
    f"{_ATTENTION}lora_unfused_kqv_adapter.v_adapter": ("attention.v", False),
    f"{_ATTENTION}lora_dense_attention_adapter": ("attention.out", True),
    f"{_MLP}lora_unfused_hto4h_adapter.gate_adapter": ("mlp.gate", False),
    f"{_MLP}lora_unfused_hto4h_adapter.up_adapter": ("mlp.up", False),
    f"{_MLP}lora_4htoh_adapter": ("mlp.down", True),
}
_QKV, _FC1 = f"{_ATTENTION}lora_kqv_adapter", f"{_MLP}lora_hto4h_adapter"


@dataclass(frozen=True)
class Adapter:
    """pairs: by weight of the vocabulary, layers.3.attention.q.weight: its A [rank, in] and B [out, rank], float32.

    dtype   of its file, which peft's has too
    """

    path: Path
    rank: int
    alpha: float
    dropout: float
    pairs: Mapping[str, tuple[Raw, Raw]]
    dtype: DType = FLOAT32
    files: list[Path] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank


def read(path: Path, base: Source) -> Adapter:
    """An adapter of a base model: a `.nemo` of NeMo's LoRA, or a folder of `peft`.

    Raises UserError for another kind of adapter, and for one that does not fit the base model.
    """
    if not path.exists():
        raise UserError("is not there", place=str(path), fix="name an adapter")
    found = _peft(path, base) if (path / PEFT).is_file() else _nemo(path, base)
    if not found.pairs:
        raise UserError("holds no LoRA weights", place=str(path))
    for name, (a, b) in found.pairs.items():
        shape = logical_of(name).size(base.model)
        if a.shape != (found.rank, shape[1]) or b.shape != (shape[0], found.rank):
            reason = f"A {list(a.shape)} and B {list(b.shape)} do not fit {name} {list(shape)} at rank {found.rank}"
            raise UserError(reason, place=str(path), fix=f"is {base.path} its base model?")
    return found


def _values(extent: Extent) -> Raw:
    return cast(extent.tensor(), extent.dtype, FLOAT32)


# --- NeMo's -----------------------------------------------------------------------------------------------------------


def _nemo(path: Path, base: Source) -> Adapter:
    tree = Tree.of(path)
    config = read_yaml(tree.need(CONFIG))
    said = config.get("peft") or {}
    lora = said.get("lora_tuning") or {}
    if said.get("peft_scheme") != "lora":
        reason = f"model.peft.peft_scheme is {said.get('peft_scheme')}, not lora"
        raise UserError(reason, place=str(path), fix="only LoRA can be merged, or is known to peft")
    if lora.get("weight_tying"):
        raise UserError("its layers share their adapters (weight_tying)", place=str(path), fix="peft has no such thing")
    ranks = {
        (int(match[1] or match[2] or 0), int(match[3] or 0)): member
        for key, member in tree.members.items()
        if (match := PER_RANK.fullmatch(key))
    }
    if "model_weights.ckpt" in tree.members:
        ranks = {(0, 0): tree.members["model_weights.ckpt"]}
    tp, pp = (int(config.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline"))
    if missing := [at for at in ((t, p) for p in range(pp) for t in range(tp)) if at not in ranks]:
        reason = f"has no weights of tensor-parallel rank {missing[0][0]}, stage {missing[0][1]}"
        raise UserError(reason, place=str(path), fix="it is not complete")
    dtype = FLOAT32
    cut: dict[tuple[int, str, str], list[Raw]] = {}
    for stage in range(pp):
        for rank in range(tp):
            member = ranks[rank, stage]
            held = torch_zip.read(member.file, member.offset, member.size)
            for key, value in held.items():
                match = _NEMO_KEY.fullmatch(str(key))
                if match is None or not isinstance(value, Extent):
                    raise UserError(f"{key} is not a tensor of LoRA", place=member.place, fix="merge dense models only")
                layer = int(match[1]) + stage * (base.model.layers // pp)
                cut.setdefault((layer, match[2], match[3]), []).append(_values(value))
                dtype = value.dtype
    pairs: dict[str, tuple[Raw, Raw]] = {}
    for (layer, place, side), inner in cut.items():
        if side == "in":
            pairs |= dict(_pairs_of(f"layers.{layer}.", place, inner, cut[layer, place, "out"], base, path))
    rank = int(lora["adapter_dim"])
    alpha = float(lora["alpha"] if lora.get("alpha") is not None else rank)
    files = sorted({member.file.path for member in tree.members.values()})
    return Adapter(path, rank, alpha, float(lora.get("adapter_dropout") or 0.0), pairs, dtype, files)


def _pairs_of(
    layer: str, place: str, inner: list[Raw], outer: list[Raw], base: Source, path: Path
) -> Iterator[tuple[str, tuple[Raw, Raw]]]:
    """The weights that one adapter of NeMo's adapts, of the pieces that tensor-parallel ranks have of it."""
    if place in _SINGLE:
        name, is_cut = _SINGLE[place]
        yield f"{layer}{name}.weight", (np.concatenate(inner, 1 if is_cut else 0), np.concatenate(outer))
        return
    a = np.concatenate(inner)
    if place == _QKV:  # rows of each group: its queries, its key, its value
        model = base.model
        whole_b = np.concatenate(outer)
        groups = whole_b.reshape(model.groups, -1, whole_b.shape[1])
        queries = model.heads // model.groups * model.head_size
        for letter, rows in zip("qkv", np.split(groups, [queries, queries + model.head_size], axis=1), strict=True):
            yield f"{layer}attention.{letter}.weight", (a, rows.reshape(-1, whole_b.shape[1]))
    elif place == _FC1 and f"{layer}mlp.gate.weight" in base.catalog.names():  # each rank's gate rows, then its up rows
        halves = [np.split(piece, 2) for piece in outer]
        for name, side in (("gate", 0), ("up", 1)):
            yield f"{layer}mlp.{name}.weight", (a, np.concatenate([half[side] for half in halves]))
    elif place == _FC1:
        yield f"{layer}mlp.up.weight", (a, np.concatenate(outer))
    else:
        raise UserError(f"the adapter {place} is not known", place=str(path), fix="merge LoRA of dense models")


# --- peft's -----------------------------------------------------------------------------------------------------------


def _projections(base: Source) -> dict[str, str]:
    """Hugging Face's modules that are one weight of the vocabulary, by name."""
    return {
        stored.key.removesuffix(".weight"): stored.parts[0].name
        for stored in hf.whole_model(base.family, base.model)
        if len(stored.parts) == 1 and not stored.parts[0].turned and len(stored.shape) == 2
    }


# Keys of adapter_config.json that make it something else than W + alpha / rank * B A.
_PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def _peft(path: Path, base: Source) -> Adapter:
    config = hf.read_json(path / PEFT)
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type is {config.get('peft_type')}, not LORA", place=str(path / PEFT))
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise UserError(f"{key} is {config[key]}", place=str(path / PEFT), fix="merge it with peft itself")
    if not (path / WEIGHTS).is_file():
        raise UserError(f"has no {WEIGHTS}", place=str(path), fix="save it with safe_serialization=True")
    dtype = FLOAT32
    known, sides = _projections(base), dict[str, dict[str, Raw]]()
    for key, value in safetensors.read(Files()(path / WEIGHTS)).items():
        match = _PEFT_KEY.fullmatch(key)
        if match is None or match[1] not in known:
            raise UserError(f"{key} belongs to nothing in {base.path}", place=str(path), fix="is that its base model?")
        sides.setdefault(known[match[1]], {})[match[2]] = _values(value)
        dtype = value.dtype
    pairs = {name: (found["A"], found["B"]) for name, found in sides.items()}
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return Adapter(
        path, rank, alpha, float(config.get("lora_dropout") or 0.0), pairs, dtype, [path / WEIGHTS, path / PEFT]
    )


def write_peft(adapter: Adapter, base: Source, target: Path, *, overwrite: bool = False, version: str = "") -> None:
    """A folder for peft.PeftModel.from_pretrained. Raises UserError for a family that peft sees otherwise."""
    modules = {name: module for module, name in _projections(base).items()}
    if strange := sorted(name for name in adapter.pairs if name not in modules):
        reason = f"{strange[0]} is no linear layer of its own in Hugging Face's {base.family.name}"
        raise UserError(reason, place=str(adapter.path), fix="merge the adapter instead: nxdt-nemo ckpt merge")
    tensors = {
        f"base_model.model.{modules[name]}.lora_{side}.weight": cast(matrix, FLOAT32, adapter.dtype)
        for name, pair in sorted(adapter.pairs.items())
        for side, matrix in zip("AB", pair, strict=True)
    }
    layers = {int(name.split(".")[1]) for name in adapter.pairs}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path) if base.format == "hf" else None,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted({modules[name].rsplit(".", 1)[1] for name in adapter.pairs}),
        "layers_to_transform": None if len(layers) == base.model.layers else sorted(layers),
        "inference_mode": True,
        **_PLAIN,
    }
    head = safetensors.header([(key, adapter.dtype, tuple(value.shape)) for key, value in tensors.items()])
    content = b"".join([head, *(bytes(torch_zip.raw_bytes(value)) for value in tensors.values())])
    outputs = [constant(WEIGHTS, content), constant(PEFT, json.dumps(config, indent=2).encode() + b"\n")]
    folder = Folder(target.absolute(), f"adapter {hashlib.sha256(content).hexdigest()}", overwrite=overwrite)
    try:
        folder.open(len(content))
        folder.write(outputs, 1, lambda _: None)
        origin = {"path": str(adapter.path), "base": str(base.path)}
        folder.commit(
            {"format": "peft", "source": origin, "written_by": f"nxdt-nemo {version}".strip()},
            [output.path for output in outputs],
        )
    finally:
        folder.close()


# --- merging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merged:
    """A weight with its adapter, of which no more is made than is read; in the weight's dtype, added up in float32."""

    catalog: Catalog
    name: str
    shape: tuple[int, ...]
    a: Raw
    b: Raw

    @property
    def dtype(self) -> DType:
        return self.catalog.dtype("model", self.name)

    @property
    def place(self) -> str:
        return f"{self.name} with its adapter"

    def read(self, box: Box) -> Raw:
        rows, columns = box.inside((0, 0))
        weight = cast(self.catalog.part("model", self.name, box).tensor(), self.dtype, FLOAT32)
        return cast(weight + self.b[rows] @ self.a[:, columns], FLOAT32, self.dtype)


def merge_into(base: Source, adapter: Adapter) -> None:
    """Let the base model's weights be the tuned ones. Optimizer state, which would be of others, goes."""
    merged = Catalog()
    for name in base.catalog.names():
        pair = adapter.pairs.get(name)
        if pair is None:
            for block in base.catalog.blocks("model", name):
                merged.put("model", name, block)
            continue
        shape = logical_of(name).size(base.model)
        array = _Merged(base.catalog, name, shape, pair[0], pair[1] * np.float32(adapter.scale))
        merged.put("model", name, Block(whole(shape), array, whole(shape)))
    base.catalog = merged
    base.files = [*base.files, *adapter.files]
    base.notes = [*base.notes, f"merged {adapter.path}: {len(adapter.pairs)} weights, alpha / rank {adapter.scale:g}"]
