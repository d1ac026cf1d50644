"""Lightning's `.ckpt` for each model-parallel rank: NeMo before distributed checkpoints, and NNM.

Room checkpoint/ (leaf). `mp_rank_TT/NAME.ckpt`, `tp_rank_TT_pp_rank_PPP/NAME.ckpt` with pipelines, `NAME.ckpt` alone
without ranks. Layers are counted from 0 in each stage; with virtual stages `model0`, `model1`, ... take the place of
`state_dict`. NNM (neuronx-nemo-megatron) writes the same, and its ZeRO-1 state to
`optim/dp_rank_DDD/NAME-optimizer_states.ckpt`; with xser tensors are files of their own (per_rank.py).
May import this room. Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nxdt_nemo.checkpoint.catalog import Catalog
from nxdt_nemo.checkpoint.dialects import megatron_args, nemo_config
from nxdt_nemo.checkpoint.dialects.megatron_core import PER_RANK, PER_RANK_TE
from nxdt_nemo.checkpoint.dialects.nemo_legacy import Spelling, nemo_legacy, spelling_of
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType
from nxdt_nemo.checkpoint.formats import megatron, megatron_optimizer, per_rank, zero1
from nxdt_nemo.checkpoint.formats.base import Options, Output, Reader, Source, Target, Training, Writer, zipped
from nxdt_nemo.checkpoint.formats.per_rank import Held, Reference
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.io.pickling import Pending
from nxdt_nemo.checkpoint.layout import Layout, padded
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Dialect, Stored, rows_of
from nxdt_nemo.errors import UserError

__all__ = [
    "MEMO",
    "READERS",
    "WRITERS",
    "NNMReader",
    "NNMWriter",
    "PTLReader",
    "PTLWriter",
    "build",
    "folder_name",
    "memo_args",
    "memo_of",
    "model_of",
    "ranks_in",
]

MEMO = "nxdt"  # what we add to a checkpoint's dict: family, vocabulary, keys that no format of ours reads
_RANK = re.compile(r"mp_rank_(\d{2,})|tp_rank_(\d{2,})_pp_rank_(\d{3,})")
_STEP = re.compile(r"step=(\d+)")
_CONSUMED = re.compile(r"consumed_samples=(\d+)")
_EMBEDDING = "embedding.word_embeddings.weight"
_NNM = Reference("nemo.collections.nlp.parts.serialization", full=True)
Ranks = dict[tuple[int, int], Path]
Chunks = dict[tuple[int, int], list[Held]]  # by (tp, pp): one, or one a virtual stage


def folder_name(layout: Layout, tp: int, pp: int) -> str:
    """The folder of a rank; "" if there is one rank."""
    if layout.tp * layout.pp == 1:
        return ""
    return f"tp_rank_{tp:02d}_pp_rank_{pp:03d}" if layout.pp > 1 else f"mp_rank_{tp:02d}"


def ranks_in(path: Path) -> Ranks:
    """Folders of ranks by (tp, pp). Empty if there are none."""
    found: Ranks = {}
    for at in sorted(path.iterdir()) if path.is_dir() else ():
        if (match := _RANK.fullmatch(at.name)) and at.is_dir():
            found[int(match[1] or match[2] or 0), int(match[3] or 0)] = at
    return found


def memo_of(source: Source, model: Model) -> dict[str, Any]:
    """What upstream's dict has no place for and a way back needs."""
    return {
        "family": source.family.name,
        "vocab": model.vocab,
        "extra": dict(model.extra),
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
        "consumed": source.training.consumed,
    }


def memo_args(memo: Any) -> dict[str, Any]:
    """The same as arguments. Empty for a checkpoint that is not ours."""
    if not isinstance(memo, Mapping):
        return {}
    args = {
        megatron.FAMILY: memo.get("family"),
        megatron_args.TRUE_VOCAB: memo.get("vocab"),
        "nxdt_extra": memo.get("extra"),
        nemo_config.SCALING: memo.get("rope_scaling"),
    }
    return {key: value for key, value in args.items() if value}


def model_of(args: Mapping[str, Any], options: Options, place: str) -> Model:
    """The Model of these arguments, or of the configuration given instead; ours may say what Megatron's cannot."""
    model = megatron.model_of(args, options, place)
    scaling = args.get(nemo_config.SCALING) if options.config is None else None
    return model.with_(rope_scaling=dict(scaling)) if scaling else model


class PTLReader(Reader):
    """Reads NeMo 1.x, with its own GPT's names or megatron-core's, and NNM."""

    format: ClassVar[str] = "ptl"

    def looks_like(self, path: Path) -> bool:
        return bool(_candidates(path)) and not _is_nnm(path)

    def read(self, path: Path, options: Options) -> Source:
        found = _candidates(path)
        if not found:
            raise UserError("has no NAME.ckpt", place=str(path), fix="name the folder that has mp_rank_XX, or the file")
        name = path.name if path.is_file() else _choose(found, options.step, path)
        base = path if path.is_dir() else path.parent
        folders = ranks_in(base)
        if not folders and _RANK.fullmatch(base.name):
            folders, base = ranks_in(base.parent), base.parent
        files = Files()
        where = folders or {(0, 0): base}
        layout = Layout(1 + max(tp for tp, _ in where), 1 + max(pp for _, pp in where))
        names = [folder_name(layout, tp, pp) for pp in range(layout.pp) for tp in range(layout.tp)]
        have = [at.name if folders else "" for at in where.values() if (at / name).is_file()]
        per_rank.check_grid(base, names, have, layout)
        states = {at: _opened(folder / name, files) for at, folder in where.items()}
        first = states[0, 0]
        config = nemo_config.of_hyper_parameters(first.get("hyper_parameters"))
        source, held, dialect = build(
            self.format,
            base,
            {at: (where[at] / name, state) for at, state in states.items()},
            nemo_config.args_of(config) | memo_args(first.get(MEMO)) if config else {},
            layout,
            options,
        )
        source.detail |= {"nemo_config": config, "name": name}
        _progress(source, first, name)
        _check_same(base, states)
        if options.optimizer:
            paths = {at: where[at] / name for at in states}
            _optimizer(source, paths, held, dialect, states, files)
        source.files = sorted(file.path for file in files)
        source.assets = dict(megatron.assets_of(base))
        return source


def _candidates(path: Path) -> list[str]:
    """Names of checkpoints: of a file itself, or in the first rank's folder, or in the folder."""
    if path.is_file():
        return [path.name] if path.suffix == ".ckpt" else []
    folders = ranks_in(path)
    at = folders.get((0, 0), next(iter(folders.values()), path))
    if not at.is_dir():
        return []
    return sorted(
        name.name
        for name in at.iterdir()
        if name.suffix == ".ckpt" and name.is_file() and "optimizer_states" not in name.name
    )


def _choose(names: Sequence[str], step: int | None, path: Path) -> str:
    """The checkpoint of a step, or the latest one."""
    steps = {name: int(match[1]) if (match := _STEP.search(name)) else -1 for name in names}
    if step is not None:
        names = [name for name in names if steps[name] == step]
        if not names:
            have = ", ".join(str(n) for n in sorted(set(steps.values())) if n >= 0) or "none by name"
            raise UserError(f"has no step {step}", place=str(path), fix=f"there are {have}")
    return max(names, key=lambda name: (steps[name], "-last" not in name))


def _is_nnm(path: Path) -> bool:
    """True if tensors or optimizer state lie as NNM puts them."""
    folders = list(ranks_in(path).values()) or [path if path.is_dir() else path.parent]
    return any((at / "optim").is_dir() or any(at.glob("*.ckpt.tensors")) for at in folders)


def _opened(path: Path, files: Files) -> dict[str, Any]:
    state = per_rank.read(path, files)
    if not isinstance(state, dict) or not ("state_dict" in state or "model0" in state):
        raise UserError("is no Lightning checkpoint: it has no state_dict", place=str(path))
    return state


def _check_same(base: Path, states: Mapping[tuple[int, int], Mapping[str, Any]]) -> None:
    found = {at: state.get("global_step") for at, state in states.items()}
    if len(set(found.values())) > 1:
        said = ", ".join(f"tp {tp} pp {pp} {value}" for (tp, pp), value in list(found.items())[:4])
        raise UserError(f"ranks differ in global_step: {said}", place=str(base), fix="files of two saves are mixed")


def consumed_of(name: str) -> int | None:
    """Samples seen, as a run of NeMo's names its checkpoints; None if `name` does not say."""
    found = _CONSUMED.search(name)
    return int(found[1]) if found else None


def _progress(source: Source, state: Mapping[str, Any], name: str) -> None:
    step = state.get("global_step")
    optimizers = state.get("optimizer_states")
    groups, count = megatron.groups_of(optimizers)
    source.training = Training(
        iteration=step if isinstance(step, int) else None,
        consumed=consumed_of(name),
        step=count,
        groups=groups,
    )


def _chunks(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arrays of each virtual stage by key, without NeMo's prefixes."""
    if "model0" in state:
        count = sum(1 for key in state if re.fullmatch(r"model\d+", str(key)))
        return [_stripped(dict(megatron.flat(state[f"model{number}"]))) for number in range(count)]
    return [_stripped(dict(megatron.flat(state.get("state_dict", state))))]


def _stripped(arrays: Mapping[str, Any]) -> dict[str, Any]:
    def strip(key: str) -> str:
        key = key.removeprefix("model.")
        return key.removeprefix("module.")

    return {strip(key): value for key, value in arrays.items()}


def build(
    name: str,
    place: Path,
    states: Mapping[tuple[int, int], tuple[Path, Mapping[str, Any]]],
    args: dict[str, Any],
    layout: Layout,
    options: Options,
) -> tuple[Source, Chunks, Dialect]:
    """A Source of ranks' files, their models or virtual stages, and the names these have.

    args   what the checkpoint says of its model, by Megatron's names; {} if nothing
    """
    held = {at: [Held(path, chunk) for chunk in _chunks(state)] for at, (path, state) in states.items()}
    first = held[0, 0][0]
    counts = [
        len(per_rank.of_layers(held[0, pp][chunk].arrays)) if chunk < len(held[0, pp]) else 0
        for chunk in range(len(held[0, 0]))
        for pp in range(layout.pp)
    ]
    layout = Layout(layout.tp, layout.pp, len(held[0, 0]))
    if len(set(counts)) > 1:
        layout = Layout(layout.tp, layout.pp, layout.vpp, stages=tuple(counts))
    core = any(key.startswith("decoder.layers.") for key in first.arrays)
    embedding = _EMBEDDING if core else f"language_model.{_EMBEDDING}"
    found = first.arrays.get(embedding)
    if args and isinstance(found, Extent):
        args = {"padded_vocab_size": found.shape[0] * layout.tp, **args}
    model = model_of(args, options, str(place))
    model = per_rank.believe(model, first, embedding, layout.tp, options)
    if model.layers != sum(counts):
        reason = f"the ranks have {sum(counts)} layers, the configuration says {model.layers}"
        raise UserError(reason, place=str(place), fix="a rank is missing, or the configuration is of another model")
    family = megatron.family_of(model, str(place))
    model = model.with_(family=family.name).check(str(place))
    source = Source(name, place, family, model, Catalog(), layout)
    dialect = dialect_of(first.arrays)
    shards = ((shard, held[shard.tp, shard.pp][shard.chunk]) for shard in layout.shards(model.layers, model.experts))
    per_rank.collect(source, dialect, shards, local=True)
    return source, held, dialect


def dialect_of(arrays: Mapping[str, Any]) -> Dialect:
    """The names that a rank's arrays have."""
    if any(key.startswith("decoder.layers.") for key in arrays):
        return PER_RANK_TE if any("layer_norm_weight" in key for key in arrays) else PER_RANK
    return nemo_legacy(spelling_of(list(arrays)))


def _optimizer(
    source: Source,
    paths: Ranks,
    held: Chunks,
    dialect: Dialect,
    states: Mapping[tuple[int, int], Mapping[str, Any]],
    files: Files,
) -> None:
    """Put the state of every rank into the catalog: ZeRO-1's files, or the one in the checkpoint itself."""
    layout = source.layout
    for (tp, pp), path in paths.items():
        params: list[Stored] = []
        for chunk, one in enumerate(held[tp, pp]):
            shard = layout.shard(source.model.layers, tp, pp, chunk, 0, ())
            params += per_rank.in_order(rows_of(dialect, source.model, source.names, shard, layout), one.arrays)
        slices = _slices(path)
        if slices:
            zero1.collect(source, params, [(at, per_rank.read(at, files)) for at in slices])
            continue
        optimizers = states[tp, pp].get("optimizer_states") or []
        if not optimizers or len(optimizers) > 1:
            said = f"{len(optimizers)} optimizers" if optimizers else "no optimizer state"
            raise UserError(f"has {said}", place=str(path), fix="leave out --with-optimizer")
        megatron_optimizer.unsharded(source, params, optimizers[0], str(path))


def _slices(path: Path) -> list[Path]:
    """ZeRO-1's files of a rank, in the order of data-parallel ranks."""
    folders = sorted((path.parent / "optim").glob("dp_rank_*"), key=lambda at: int(at.name[8:]))
    stem = path.name.removesuffix(".ckpt").removesuffix("-last")
    last = path.name.endswith("-last.ckpt")
    names = {f"{stem}-optimizer_states{'-last' if last else ''}.ckpt", path.name.replace("ckpt", "optimizer_states")}
    found = [next((at / name for name in sorted(names) if (at / name).is_file()), None) for at in folders]
    if any(found) and not all(found):
        missing = folders[found.index(None)]
        raise UserError(
            f"has no state of {path.name}", place=str(missing), fix="copy it, or leave out --with-optimizer"
        )
    numbers = [int(at.name[8:]) for at in folders]
    if any(found) and numbers != list(range(len(numbers))):
        raise UserError(f"has data-parallel ranks {numbers}", place=str(path.parent / "optim"), fix="one is missing")
    return [at for at in found if at is not None]


@dataclass
class PTLWriter(Writer):
    """Writes NeMo's own GPT (`mcore_gpt: false`), which is what NeMo 2.x reads a file a rank of.

    Options: names, `legacy`, or `core` for megatron-core's with `mcore_gpt: true` (NeMo 1.20 to 1.22).
    """

    format: ClassVar[str] = "ptl"
    name: str = "megatron_gpt"
    _bare: bool = False

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        self._source = source
        layout = target.layout.check(source.model.layers, source.model.experts)
        if layout.ep > 1 or source.model.experts:
            raise UserError(
                "holds no experts", place=f"--to {self.format}", fix="use nemo, torch, torch_dist, nxdt or hf"
            )
        rows = padded(source.model.vocab, target.divisible_by, layout.tp)
        model = source.model.with_(padded_vocab=rows)
        self._check(model, target)
        dtype = target.dtype or source.dtype
        for pp in range(layout.pp):
            for tp in range(layout.tp):
                yield from self._rank(source, target, model, dtype, tp, pp)

    def last(self) -> Iterable[Output]:
        return () if self._bare else megatron.asset_outputs(self._source)

    def state_dicts(self, source: Source, target: Target) -> Iterator[Output]:
        """The weights alone, as a `.nemo` file holds them: a file for each rank."""
        self._bare = True
        yield from self.outputs(source, target)

    def _check(self, model: Model, target: Target) -> None:
        if target.extra.get("names", "legacy") == "legacy" and model.groups != model.heads:
            reason = "NeMo's own GPT has no grouped queries"
            raise UserError(reason, place="--to ptl", fix="use --to nemo or nemo_dist, or --option names=core")
        if target.layout.vpp > 1:
            raise UserError("vpp is not written", place="--to ptl", fix="use --vpp 1, or --to nemo_dist")

    def _dialect(self, model: Model, target: Target) -> Dialect:
        return PER_RANK_TE if target.extra.get("names") == "core" else nemo_legacy(Spelling())

    def _rank(self, source: Source, target: Target, model: Model, dtype: DType, tp: int, pp: int) -> Iterator[Output]:
        layout, dialect = target.layout, self._dialect(model, target)
        shards = [layout.shard(model.layers, tp, pp, chunk, 0, ()) for chunk in range(layout.vpp)]
        found = [list(rows_of(dialect, model, source.names, shard, layout)) for shard in shards]
        arrays = [per_rank.arrays_of(source, "model", some, target.dtype) for some in found]
        state: dict[str, Any] = {
            "epoch": 0,
            "global_step": source.training.iteration or 0,
            "pytorch-lightning_version": self._lightning(),
        }
        state |= self._model(source, model, target, arrays)
        state["hparams_name"] = "cfg"
        config = self._config(source, model, target, dtype)
        state["hyper_parameters"] = {"cfg": nemo_config.structured(config) if self.format == "ptl" else config}
        state[MEMO] = memo_of(source, model)
        folder = folder_name(layout, tp, pp)
        path = f"{folder}/{self._name(source)}" if folder else self._name(source)
        yield from self._files(source, target, path, state, [stored for some in found for stored in some])

    def _lightning(self) -> str:
        return "2.4.0"

    def _name(self, source: Source) -> str:
        training = source.training
        name = f"{self.name}--step={training.iteration or 0}"
        consumed = f"-consumed_samples={training.consumed}.0" if training.consumed is not None else ""
        return f"{name}{consumed}.ckpt"

    def _model(
        self, source: Source, model: Model, target: Target, arrays: Sequence[dict[str, Pending]]
    ) -> dict[str, Any]:
        (only,) = arrays
        state: dict[str, Any] = {f"model.{key}": value for key, value in only.items()}
        if not model.learned_positions and target.extra.get("names", "legacy") == "legacy":
            size = int(model.head_size * model.rope_fraction)
            state["model.language_model.rotary_pos_emb.inv_freq"] = _inverse_frequencies(size, model.rope_base)
        return {"state_dict": state}

    def _config(self, source: Source, model: Model, target: Target, dtype: DType) -> dict[str, Any]:
        kept = source.detail.get("nemo_config") or nemo_config.TEMPLATE
        config = nemo_config.config_of(model, target.layout, kept, dtype)
        core = target.extra.get("names") == "core"
        pieces = source.assets.get("tokenizer.model")
        if isinstance(pieces, Path) and not source.detail.get("nemo_config"):
            config["tokenizer"] = {**config["tokenizer"], "library": "sentencepiece", "model": str(pieces)}
        return {**config, "mcore_gpt": core, "make_vocab_size_divisible_by": target.divisible_by}

    def _files(
        self, source: Source, target: Target, path: str, state: dict[str, Any], params: Sequence[Stored]
    ) -> Iterator[Output]:
        if self._bare:
            state = state["state_dict"]
        elif len(target.kinds) > 1:
            state["optimizer_states"] = [megatron_optimizer.part_of(source, target, params)]
            state["lr_schedulers"] = [_scheduler(source)]
        yield zipped(path, state)


def _inverse_frequencies(size: int, base: float) -> Pending:
    """Of rotary positions, by torch: NeMo takes them from the file, and numpy's powers differ in the last bit."""
    import torch

    powers = torch.arange(0, size, 2, dtype=torch.float32) / size
    return Pending.given((1.0 / base**powers).numpy(), FLOAT32)


def _scheduler(source: Source) -> dict[str, Any]:
    step = source.training.iteration or 0
    return {"last_epoch": step, "_step_count": step + 1}


class NNMReader(PTLReader):
    """Reads NNM's: the same files, xser or not."""

    format = "nnm"

    def looks_like(self, path: Path) -> bool:
        return bool(_candidates(path)) and _is_nnm(path)


@dataclass
class NNMWriter(PTLWriter):
    """Writes NNM's. Options: xser; gqa_qkv, for one array of attention with grouped queries; dp, ranks of ZeRO-1."""

    format: ClassVar[str] = "nnm"

    def _check(self, model: Model, target: Target) -> None:
        if (model.qkv_bias and not model.bias) or model.qk_norm or model.norm_from_one:
            raise UserError(f"cannot hold {model.family}'s layers", place="--to nnm", fix="use nxdt, nemo or hf")

    def _dialect(self, model: Model, target: Target) -> Dialect:
        split = model.groups != model.heads and not target.extra.get("gqa_qkv")
        nested = target.layout.vpp > 1
        return nemo_legacy(
            Spelling(split=split, head="word_embeddings_for_head.weight" if nested else "word_embeddings.weight")
        )

    def _lightning(self) -> str:
        return "1.9.5"

    def _model(
        self, source: Source, model: Model, target: Target, arrays: Sequence[dict[str, Pending]]
    ) -> dict[str, Any]:
        if len(arrays) == 1:
            return {"state_dict": {f"model.{key}": value for key, value in arrays[0].items()}}
        chunks = {f"model{number}": nested(chunk) for number, chunk in enumerate(arrays)}
        return {"state_dict": {}, **chunks}

    def _config(self, source: Source, model: Model, target: Target, dtype: DType) -> dict[str, Any]:
        config = super()._config(source, model, target, dtype)
        config = {key: value for key, value in config.items() if key != "mcore_gpt"}
        config["activation"] = str(config["activation"]).removeprefix("fast-")
        config |= {"wrap_with_zero": len(target.kinds) > 1, "has_bias": model.bias}
        if model.groups != model.heads:
            config["num_kv_heads"] = model.groups
        return config

    def _files(
        self, source: Source, target: Target, path: str, state: dict[str, Any], params: Sequence[Stored]
    ) -> Iterator[Output]:
        yield from self._saved(target, path, state)
        if len(target.kinds) > 1:
            folder, _, name = path.rpartition("/")
            ranks = int(target.extra.get("dp", 1))
            name = name.removesuffix(".ckpt") + "-optimizer_states.ckpt"
            for rank in range(ranks):
                at = f"{folder}/optim" if folder else "optim"
                part = zero1.state_of(source, target, params, rank, ranks)
                yield from self._saved(target, f"{at}/dp_rank_{rank:03d}/{name}", [part])

    def _saved(self, target: Target, path: str, value: Any) -> Iterator[Output]:
        if target.extra.get("xser"):
            yield from per_rank.xser(path, value, _NNM)[0]
            return
        yield zipped(path, value)


def nested(arrays: Mapping[str, Pending]) -> dict[str, Any]:
    """A model as modules before megatron-core nest it: each takes its own keys off, layers stay joined by dots."""
    model: dict[str, Any] = {"language_model": {}}
    language = model["language_model"]
    for key, value in arrays.items():
        rest = key.removeprefix("language_model.")
        if rest == key:
            name, _, last = key.rpartition(".")
            model.setdefault(name, {})[last] = value
        elif rest.startswith("encoder."):
            language.setdefault("encoder", {})[rest.removeprefix("encoder.")] = value
        else:
            place = language
            *names, last = rest.split(".")
            for name in names:
                place = place.setdefault(name, {})
            place[last] = value
    return model


READERS = {"ptl": PTLReader, "nnm": NNMReader}
WRITERS = {"ptl": PTLWriter, "nnm": NNMWriter}
