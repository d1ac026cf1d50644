"""neuronx-distributed's checkpoints (NxD), which NxDT trains with: a file for each tensor- and pipeline-parallel rank.

Room checkpoint/ (leaf). TAG/{checkpoint, done, user_content.pt, model/, optim/}, in both folders
dp_rank_DD[_ep_rank_EE]_tp_rank_TT_pp_rank_PP.pt (neuronx_distributed/trainer/checkpoint.py). Layers have the whole
model's numbers. Names are Hugging Face's (dialects/nxd_hf.py) or Megatron's (dialects/nemo_legacy.py). With xser a
file refers to tensors in FILE.tensors/ and FILE.info.pt has their shapes; NxD's converter leaves them in the file.
May import this room. Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from nxdt_nemo.checkpoint.catalog import Catalog
from nxdt_nemo.checkpoint.dialects import megatron_args, nemo_config
from nxdt_nemo.checkpoint.dialects.nemo_legacy import Spelling, nemo_legacy, spelling_of
from nxdt_nemo.checkpoint.dialects.nxd_hf import Copies, Form, form_of, nxd_hf
from nxdt_nemo.checkpoint.dtypes import Raw, same
from nxdt_nemo.checkpoint.formats import megatron, megatron_optimizer, per_rank, ptl, zero1
from nxdt_nemo.checkpoint.formats.base import (
    Options,
    Output,
    Reader,
    Source,
    Target,
    Training,
    Writer,
    constant,
    zipped,
)
from nxdt_nemo.checkpoint.formats.per_rank import Held, Reference
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.io.pickling import Size
from nxdt_nemo.checkpoint.layout import Layout, Shard, padded
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Dialect, Stored, rows_of
from nxdt_nemo.errors import UserError

__all__ = ["READERS", "WRITERS", "NxDTReader", "NxDTWriter"]

_FILE = re.compile(r"dp_rank_(\d{2,})(?:_ep_rank_(\d{2,}))?_tp_rank_(\d{2,})_pp_rank_(\d{2,})\.pt")
_STEP = re.compile(r"step[=_](\d+)")
_XLA = Reference("torch_xla.utils.serialization")
CONTENT, CONFIG, DONE = "user_content.pt", "config.json", "done"
_HARDWARE = ("trn1", "trn2")


Shards = list[tuple[Shard, Held]]


class _Rank(NamedTuple):
    ep: int
    tp: int
    pp: int


class NxDTReader(Reader):
    """Reads both styles, xser or not. Option hw_backend, trn1 or trn2: the order of copied heads, where it is open."""

    format: ClassVar[str] = "nxdt"

    def looks_like(self, path: Path) -> bool:
        return any(_ranks(at / "model") for at in [path, *_tags(path)]) or bool(_ranks(path))

    def read(self, path: Path, options: Options) -> Source:
        tag = _tag_of(path, options.step)
        folder = tag / "model" if _ranks(tag / "model") else tag
        if folder != tag and not (tag / DONE).is_file():
            fix = "saving was interrupted: use an earlier one, or make an empty file done if you know it is whole"
            raise UserError(f"has no {DONE}", place=str(tag), fix=fix)
        ranks = _ranks(folder)
        files = Files()
        layout = Layout(
            tp=1 + max(rank.tp for rank in ranks),
            pp=1 + max(rank.pp for rank in ranks),
            ep=1 + max(rank.ep for rank in ranks),
        )
        wanted = [_Rank(ep, tp, pp) for ep in range(layout.ep) for tp in range(layout.tp) for pp in range(layout.pp)]
        names = {rank: _name(rank, layout) for rank in wanted}
        per_rank.check_grid(folder, names.values(), [_name(rank, layout) for rank in ranks], layout)
        held = {rank: Held(path, _arrays(path, rank, files)) for rank, path in ranks.items()}
        content = per_rank.read(tag / CONTENT, files) if (tag / CONTENT).is_file() else {}
        if not isinstance(content, dict):
            raise UserError("is no dict", place=str(tag / CONTENT))
        source, shards, dialect = _source(tag, held, content, layout, options)
        if options.optimizer:
            _optimizer(source, tag, shards, dialect, files)
        source.files = sorted(file.path for file in files)
        return source


def _tags(path: Path) -> list[Path]:
    """Folders of checkpoints in a folder of them."""
    if not path.is_dir():
        return []
    return [at for at in sorted(path.iterdir()) if at.is_dir() and (at / "model").is_dir()]


def _tag_of(path: Path, step: int | None) -> Path:
    """The folder itself, or the step's, or the latest complete one in it."""
    if _ranks(path) or _ranks(path / "model"):
        return path.parent if path.name == "model" and (path.parent / DONE).is_file() else path
    tags = [at for at in _tags(path) if _ranks(at / "model")]
    steps = {at: int(match[1]) if (match := _STEP.search(at.name)) else -1 for at in tags}
    if step is not None:
        tags = [at for at in tags if steps[at] == step]
        if not tags:
            have = ", ".join(at.name for at in steps) or "none"
            raise UserError(f"has no step {step}", place=str(path), fix=f"there are {have}")
    whole = [at for at in tags if (at / DONE).is_file()]
    if not whole:
        said = f"has {len(tags)} checkpoints, none with {DONE}" if tags else "has no model/dp_rank_00_tp_rank_XX..."
        raise UserError(said, place=str(path), fix="name a folder that has model/ and done")
    return max(whole, key=lambda at: (steps[at], at.stat().st_mtime))


def _ranks(folder: Path) -> dict[_Rank, Path]:
    """Files of ranks; of data-parallel rank 0, which has the model's."""
    found = {}
    for at in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (match := _FILE.fullmatch(at.name)) and int(match[1]) == 0:
            found[_Rank(int(match[2] or 0), int(match[3]), int(match[4]))] = at
    return found


def _name(rank: _Rank, layout: Layout, dp: int = 0) -> str:
    expert = f"_ep_rank_{rank.ep:02d}" if layout.ep > 1 else ""
    return f"dp_rank_{dp:02d}{expert}_tp_rank_{rank.tp:02d}_pp_rank_{rank.pp:02d}.pt"


def _arrays(path: Path, rank: _Rank, files: Files) -> dict[str, Any]:
    state = torch_zip.read(files(path))
    if not isinstance(state, dict):
        raise UserError("is no dict of tensors", place=str(path))
    if rank.ep and any(per_rank.is_reference(value) for value in state.values()):
        # Only experts' tensors are in this folder; the others are in the first expert rank's.
        state = {key: value for key, value in state.items() if ".moe.expert" in key}
    arrays = per_rank.read_only(path, state, files)
    inner = arrays.get("model")
    return dict(inner) if isinstance(inner, dict) else arrays


def _source(
    tag: Path, held: Mapping[_Rank, Held], content: Mapping[str, Any], layout: Layout, options: Options
) -> tuple[Source, Shards, Dialect]:
    first = held[_Rank(0, 0, 0)]
    megatron_style = any(key.startswith("language_model.") for key in first.arrays)
    memo = content.get(ptl.MEMO)
    options = _with_config(tag, options) if not isinstance(memo, dict) or "args" not in memo else options
    embedding = "language_model.embedding.word_embeddings.weight" if megatron_style else "model.embed_tokens.weight"
    args = _args(content)
    found = first.arrays.get(embedding)
    if args and isinstance(found, Extent):
        args["padded_vocab_size"] = found.shape[0] * layout.tp
    model = ptl.model_of(args, options, str(tag))
    model = per_rank.believe(model, first, embedding, layout.tp, options)
    family = megatron.family_of(model, str(tag))
    model = model.with_(family=family.name).check(str(tag))
    source = Source("nxdt", tag, family, model, Catalog(), layout, _training(tag, content))
    copies = Copies()
    if megatron_style:
        dialect = nemo_legacy(spelling_of(list(first.arrays)))
    else:
        form = form_of(list(first.arrays))
        copies = _copies(source, first, held, form, content, options)
        dialect = nxd_hf(form, copies)
    shards = [(_shard(rank, at, model, layout, embedding), at) for rank, at in held.items()]
    layers = sorted({layer for shard, _ in shards for layer in shard.layers})
    if layers != list(range(model.layers)):
        missing = sorted(set(range(model.layers)) - set(layers)) or [layers[-1]]
        reason = f"layers {missing[:6]} of {model.layers} do not match the ranks' files"
        raise UserError(reason, place=str(tag), fix="a rank is missing, or the configuration is of another model")
    hint = "; of NxD: --option hw_backend=trn1 or trn2 says how heads are placed"
    per_rank.collect(source, dialect, shards, local=False, expert_ranks=True, hint=hint)
    source.detail = {
        "style": "megatron" if megatron_style else "hf",
        "kv_multiplier": copies.multiplier,
        "hw_backend": copies.hardware if copies.multiplier > 1 else None,
        "nemo_config": {},
    }
    return source, shards, dialect


def _with_config(tag: Path, options: Options) -> Options:
    """Options with the config.json that lies beside the checkpoint, if none is given."""
    if options.config is None and (tag / CONFIG).is_file():
        return Options(
            options.format, options.family, tag / CONFIG, options.step, options.vocab, options.optimizer, options.extra
        )
    return options


def _args(content: Mapping[str, Any]) -> dict[str, Any]:
    """What user_content.pt says of the model: our own note, or NxDT's configuration in Megatron's style."""
    memo = content.get(ptl.MEMO)
    if isinstance(memo, Mapping) and isinstance(memo.get("args"), Mapping):
        return {**memo["args"], **ptl.memo_args(memo)}
    config = nemo_config.of_hyper_parameters(content.get("hyper_parameters"))
    inner = config.get("model")
    if isinstance(inner, Mapping) and inner.get("num_layers") and inner.get("num_attention_heads"):
        return nemo_config.args_of(inner)
    return nemo_config.args_of(config) if config.get("num_layers") else {}


def _training(tag: Path, content: Mapping[str, Any]) -> Training:
    step, consumed = content.get("global_step"), ptl.consumed_of(tag.name)
    found = _STEP.search(tag.name)
    if not isinstance(step, int):
        step = int(found[1]) if found else None
    memo = content.get(ptl.MEMO)
    noted = memo.get("consumed") if isinstance(memo, Mapping) else None
    return Training(iteration=step, consumed=noted if consumed is None else consumed)


def _shard(rank: _Rank, held: Held, model: Model, layout: Layout, embedding: str) -> Shard:
    """What a file has, by its keys: NxD cuts pipelines where the user says."""
    each = model.experts // layout.ep
    norms = ("model.norm.weight", "language_model.encoder.final_layernorm.weight")
    return Shard(
        tp=rank.tp,
        ranks=layout.tp,
        layers=per_rank.of_layers(held.arrays),
        experts=range(rank.ep * each, (rank.ep + 1) * each),
        expert_tp=rank.tp,
        expert_ranks=layout.tp,
        first=embedding in held.arrays,
        last=any(norm in held.arrays for norm in norms),
        pp=rank.pp,
        ep=rank.ep,
    )


def _copies(
    source: Source,
    first: Held,
    held: Mapping[_Rank, Held],
    form: Form,
    content: Mapping[str, Any],
    options: Options,
) -> Copies:
    """How often and in which order key-value heads are there: from the arrays' sizes, and what is said of it.

    Raises UserError if nothing says for which hardware heads were placed, or what is said is not so.
    """
    model, tp = source.model, source.layout.tp
    rows = _key_rows(first, form, model, tp)
    whole = rows * tp
    if whole % (model.groups * model.head_size):
        reason = (
            f"{rows} rows of keys on each of {tp} ranks are no multiple of {model.groups} heads x {model.head_size}"
        )
        raise UserError(reason, place=str(first.path), fix="use the configuration that belongs to the weights")
    multiplier = whole // (model.groups * model.head_size)
    if multiplier == 1:
        return Copies()
    memo = content.get(ptl.MEMO)
    said = options.extra.get("hw_backend") or (memo.get("hw_backend") if isinstance(memo, Mapping) else None)
    found = _order(held, form, model, tp, multiplier)
    if said is not None and said not in _HARDWARE:
        raise UserError(f"hw_backend={said} is not known", place="--option", fix="use trn1 or trn2")
    if model.groups == 1:  # all orders are the same
        return Copies(multiplier, "trn2")
    if said is None and found != "trn2":
        # NxD's converter places keys so for trn2 too, and queries otherwise.
        reason = f"has {multiplier} copies of {model.groups} key-value heads, and nothing says for which hardware"
        raise UserError(reason, place=str(first.path), fix="say it: --option hw_backend=trn1 (or trn2)")
    if said and found and said != found:
        reason = f"keys are placed as for {found}, hw_backend says {said}"
        fix = "NxD's converter does so for trn2, a model that computes wrongly: convert the original once more"
        raise UserError(reason, place=str(first.path), fix=fix)
    return Copies(multiplier, said or found or "trn1")


def _key_rows(first: Held, form: Form, model: Model, tp: int) -> int:
    """Rows of keys that a rank has."""
    ends = {"three": "qkv_proj.weight_k", "fused": "qkv_proj.weight_qkv", "stride": "qkv_proj.weight"}
    end = ends.get(form, "k_proj.weight")
    found = next((value for key, value in first.arrays.items() if key.endswith(f".self_attn.{end}")), None)
    if not isinstance(found, Extent):
        raise UserError(f"has no {end}", place=str(first.path), fix="it is no checkpoint of NxD, or not complete")
    if form in ("three", "separate"):
        return found.shape[0]
    return (found.shape[0] - model.heads * model.head_size // tp) // 2


def _order(held: Mapping[_Rank, Held], form: Form, model: Model, tp: int, multiplier: int) -> Any:
    """trn1 or trn2, if the first layer's keys are copies of each other in one of the two orders only."""
    if model.groups == 1:
        return None
    heads: list[Raw] = []
    size, count = model.head_size, model.groups * multiplier // tp
    for rank in range(tp):
        arrays = held[_Rank(0, rank, 0)].arrays
        end = {"three": "weight_k", "fused": "weight_qkv", "stride": "weight"}.get(form, "k_proj.weight")
        key = next(key for key in arrays if key.endswith(end) and ".self_attn." in key)
        begin = 0 if form in ("three", "separate") else model.heads * size // tp
        rows = arrays[key].tensor()[begin : begin + count * size]
        heads += [rows[at : at + size] for at in range(0, len(rows), size)]

    def fits(hardware: str) -> bool:
        seen: dict[int, Raw] = {}
        for slot, rows in enumerate(heads):
            head = slot // multiplier if hardware == "trn2" else slot % model.groups
            if not same(seen.setdefault(head, rows), rows):
                return False
        return True

    good = [hardware for hardware in _HARDWARE if fits(hardware)]
    return good[0] if len(good) == 1 else None


def _optimizer(source: Source, tag: Path, shards: Shards, dialect: Dialect, files: Files) -> None:
    """ZeRO-1's slices, or one state a rank."""
    folder = tag / "optim"
    if not folder.is_dir():
        raise UserError("has no optim/", place=str(tag), fix="leave out --with-optimizer")
    numbers = {int(match[1]) for at in folder.iterdir() if (match := _FILE.fullmatch(at.name))}
    layout = source.layout
    if layout.ep > 1 or source.model.experts:
        raise UserError("has optimizer state of experts", place=str(folder), fix="leave out --with-optimizer")
    for shard, held in shards:
        found = rows_of(dialect, source.model, source.names, shard, layout, local=False)
        params = per_rank.in_order(found, held.arrays)
        rank = _Rank(0, shard.tp, shard.pp)
        paths = [folder / _name(rank, layout, dp) for dp in range(1 + max(numbers, default=0))]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError("is not there", place=str(missing[0]), fix="copy it, or leave out --with-optimizer")
        states = [(path, per_rank.read(path, files)) for path in paths]
        if isinstance(states[0][1], Mapping) and "base_state" not in states[0][1] and len(states) == 1:
            megatron_optimizer.unsharded(source, params, states[0][1], str(paths[0]))
        else:
            zero1.collect(source, params, states)


@dataclass
class NxDTWriter(Writer):
    """Writes a folder TAG that NxD's load_checkpoint reads.

    Options: style, `hf` or `megatron`; xser; kv_multiplier, copies of key-value heads (as few as tp needs by default);
    hw_backend, trn1 or trn2, needed with copies; fuse_qkv; dp, ranks of ZeRO-1; no_decay, `bias` or `norm`: what is in
    the optimizer's second group, biases alone or norms too. NxDT's default is the first for style hf, else the second.
    """

    format: ClassVar[str] = "nxdt"

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        layout = target.layout.check(source.model.layers, source.model.experts)
        style = _one_of(target, "style", "hf", "megatron")
        rules = ("bias", "norm") if style == "hf" else ("norm", "bias")
        self._norms = _one_of(target, "no_decay", *rules) == "norm"
        if len(target.kinds) > 1 and source.model.experts:
            raise UserError("holds no optimizer state of experts", place="--to nxdt", fix="leave out --with-optimizer")
        self._source, self._target = source, target
        divisor = 1 if style == "hf" else target.divisible_by
        self._model = source.model.with_(padded_vocab=padded(source.model.vocab, divisor, layout.tp))
        self._style, self._copies = style, _wanted_copies(self._model, target)
        self._check()
        dialect = self._dialect()
        for pp in range(layout.pp):
            for tp in range(layout.tp):
                for ep in range(layout.ep):
                    yield from self._rank(dialect, _Rank(ep, tp, pp))

    def _check(self) -> None:
        model, style = self._model, self._style
        hf = style == "hf" and (model.bias or model.learned_positions or not model.gated or model.norm == "LayerNorm")
        megatron_style = style == "megatron" and ((model.qkv_bias and not model.bias) or model.qk_norm)
        if hf or megatron_style:
            other = "megatron" if hf else "hf"
            raise UserError(
                f"cannot hold {model.family}'s layers in style {style}", place="--to nxdt", fix=f"use style={other}"
            )

    def _dialect(self) -> Dialect:
        model = self._model
        if self._style == "megatron":
            return nemo_legacy(Spelling(split=model.groups != model.heads))
        fused = bool(self._target.extra.get("fuse_qkv"))
        many = model.groups == model.heads and self._copies.multiplier == 1
        form: Form = ("stride" if many else "fused") if fused else "separate" if many else "three"
        return nxd_hf(form, self._copies)

    def _shard(self, rank: _Rank) -> Shard:
        """All virtual stages of a rank as one: layers have the model's numbers."""
        layout, model = self._target.layout, self._model
        layers = [n for chunk in range(layout.vpp) for n in layout.layers_of(model.layers, rank.pp, chunk)]
        each = model.experts // layout.ep
        return Shard(
            tp=rank.tp,
            ranks=layout.tp,
            layers=layers,
            experts=range(rank.ep * each, (rank.ep + 1) * each),
            expert_tp=rank.tp,
            expert_ranks=layout.tp,
            first=rank.pp == 0,
            last=rank.pp == layout.pp - 1,
            pp=rank.pp,
            ep=rank.ep,
        )

    def _rank(self, dialect: Dialect, rank: _Rank) -> Iterator[Output]:
        source, target, layout = self._source, self._target, self._target.layout
        found = list(rows_of(dialect, self._model, source.names, self._shard(rank), layout, local=False))
        arrays = per_rank.arrays_of(source, "model", found, target.dtype)
        experts = {stored.key for stored in found if stored.row.expert}
        path = f"model/{_name(rank, layout)}"
        own = {at for at, key in enumerate(arrays) if key in experts}
        for output in self._saved(path, arrays, own if layout.ep > 1 else set()):
            # Tensors that are not an expert's lie in the first expert rank's folder alone.
            if not rank.ep or ".tensors/" not in output.path or _number(output.path) in own:
                yield output
        if len(target.kinds) > 1:
            yield from self._optimizer(rank, found)

    def _optimizer(self, rank: _Rank, params: Sequence[Stored]) -> Iterator[Output]:
        ranks = int(self._target.extra.get("dp", 1))
        for dp in range(ranks):
            state = zero1.state_of(self._source, self._target, params, dp, ranks, self._norms)
            path = f"optim/{_name(rank, self._target.layout, dp)}"
            yield from self._saved(path, state)

    def _saved(self, path: str, value: Any, experts: Container[int] = ()) -> Iterator[Output]:
        """One file; with xser one for each tensor, too. experts: tensors, by number, that expert ranks divide."""
        if not self._target.extra.get("xser"):
            yield zipped(path, value)
            return
        outputs, tensors = per_rank.xser(path, value, _XLA)
        yield from outputs
        info = {
            number: {"dtype": one.dtype, "shape": Size(one.shape), "expert_model_parallel": number in experts}
            for number, one in tensors.items()
        }
        yield zipped(f"{path}.info.pt", info)

    def last(self) -> Iterable[Output]:
        source, model = self._source, self._model
        step = source.training.iteration or 0
        dtype = self._target.dtype or source.dtype
        args = {
            key: value
            for key, value in megatron_args.to_args(model, self._target.layout, dtype).items()
            if isinstance(value, (str, int, float, bool, list, tuple, type(None)))
        }
        memo = {**ptl.memo_of(source, model), "args": args, "style": self._style}
        if self._copies.multiplier > 1:
            memo |= {"hw_backend": self._copies.hardware, "kv_multiplier": self._copies.multiplier}
        content = {
            "epoch": 0,
            "global_step": step,
            "pytorch-lightning_version": "2.5.0",
            "hyper_parameters": {"cfg": {"wrap_with_zero": len(self._target.kinds) > 1}},
            ptl.MEMO: memo,
        }
        if len(self._target.kinds) > 1:
            content["lr_schedulers"] = [{"last_epoch": step, "_step_count": step + 1}]
        config = source.family.to_hf(model.with_(vocab=model.padded_vocab))
        config["torch_dtype"] = dtype.name
        for name, asset in source.assets.items():
            yield constant(name, asset.read_bytes())
        yield constant(CONFIG, json.dumps(config, indent=2, sort_keys=True, default=str).encode() + b"\n")
        yield zipped(CONTENT, content)
        yield constant("checkpoint", b"1")
        yield constant(DONE, b"1")


def _number(path: str) -> int:
    return int(path.rpartition("tensor_")[2].removesuffix(".pt"))


def _one_of(target: Target, name: str, *names: str) -> str:
    """An option's value; the first by default."""
    value = str(target.extra.get(name) or names[0])
    if value not in names:
        raise UserError(f"{name}={value} is not known", place="--option", fix=f"use {' or '.join(names)}")
    return value


def _wanted_copies(model: Model, target: Target) -> Copies:
    """Copies of key-value heads as asked for, or as few as there are ranks for."""
    tp, style = target.layout.tp, target.extra.get("style") or "hf"
    said = target.extra.get("kv_multiplier")
    least = tp // model.groups if tp > model.groups and tp % model.groups == 0 else 1
    multiplier = int(said) if said else least
    if multiplier > 1 and style == "megatron":
        reason = f"style megatron has no copies of heads: tp={tp} for {model.groups} key-value heads"
        raise UserError(reason, place="--to nxdt", fix="use style=hf, or a tp that divides the heads")
    hardware: Any = target.extra.get("hw_backend")
    if multiplier > 1 and hardware not in _HARDWARE:
        reason = f"{multiplier} copies of key-value heads lie in another order on trn1 and trn2"
        raise UserError(reason, place="--to nxdt", fix="say which: --option hw_backend=trn1 (or trn2)")
    return Copies(multiplier, hardware) if multiplier > 1 else Copies()


READERS = {"nxdt": NxDTReader}
WRITERS = {"nxdt": NxDTWriter}
