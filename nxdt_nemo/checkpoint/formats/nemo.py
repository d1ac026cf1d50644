"""NeMo's checkpoints: `.nemo`, a tar archive or a folder; distributed ones of training; NeMo 2.0's folders.

Room checkpoint/ (leaf).
    nemo       model_config.yaml, a tokenizer's files, and weights: model_weights/ (distributed), model_weights.ckpt,
               or mp_rank_TT/model_weights.ckpt
    nemo_dist  what NeMo 1.x saves in training with megatron-core: a distributed folder, Lightning's dict in common.pt
    nemo2      weights/ (distributed) and context/ (what the model is)
An archive is read in place. May import yaml and this room. Proof: tests/checkpoint/test_other_formats.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import yaml

from nxdt_nemo.checkpoint.dialects import megatron_args, nemo_config, nemo_context
from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType
from nxdt_nemo.checkpoint.formats import distributed, megatron, per_rank, ptl, torch_dist
from nxdt_nemo.checkpoint.formats.base import Bytes, Options, Output, Reader, Source, Target, Writer, constant
from nxdt_nemo.checkpoint.formats.torch_dist import COMMON, METADATA, TorchDistWriter
from nxdt_nemo.checkpoint.io import tar, torch_zip
from nxdt_nemo.checkpoint.io.files import Mapped
from nxdt_nemo.checkpoint.io.tar import Member, Tree
from nxdt_nemo.checkpoint.io.unpickle import Inert
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.errors import UserError, one_line

__all__ = [
    "CONFIG",
    "PER_RANK",
    "READERS",
    "WRITERS",
    "Nemo2Reader",
    "NemoDistReader",
    "NemoReader",
    "NemoWriter",
    "is_gpt_by_rank",
    "read_yaml",
]

CONFIG, WEIGHTS, MEMO = "model_config.yaml", "model_weights", "nxdt_model.json"
IO, TOKENIZER, ARTIFACTS = "context/io.json", "context/nemo_tokenizer", "context/artifacts"
GENERATION = "generation_config.json"
PER_RANK = re.compile(r"(?:mp_rank_(\d{2,})|tp_rank_(\d{2,})_pp_rank_(\d{3,}))/model_weights\.ckpt")
_HASHED = re.compile(r"[0-9a-f]{32}_(.+)")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class _Inside:
    """A member as an asset."""

    member: Member

    def read_bytes(self) -> bytes:
        return self.member.bytes()


def read_yaml(member: Member) -> dict[str, Any]:
    """A YAML file's mapping. Tags make nothing: NeMo's own files have none."""
    try:
        found = yaml.load(member.bytes(), Loader=_Plain)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is no YAML: {one_line(error)}", place=member.place) from error
    if not isinstance(found, dict):
        raise UserError("is no mapping", place=member.place)
    return found


class _Plain(yaml.SafeLoader):
    """YAML's plain kinds, and Python's tuples as lists; any other tag is an error."""


_constructors: Any = _Plain
_constructors.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)


def _memo(tree: Tree) -> dict[str, Any]:
    """What we wrote beside; {} for NeMo's own."""
    if MEMO not in tree.members:
        return {}
    try:
        found = json.loads(tree.members[MEMO].bytes())
    except ValueError as error:
        raise UserError(f"is no JSON: {error}", place=tree.members[MEMO].place) from error
    return ptl.memo_args(found)


def _distributed(
    name: str, place: Path, weights: Mapping[str, Member], args: dict[str, Any], options: Options, common: Any
) -> Source:
    """A Source of a distributed folder's members. args: what the model is, by Megatron's names."""
    if METADATA not in weights:
        if any(key.endswith(".zarray") for key in weights):
            fix = "unpack it, and convert the folder model_weights with --from zarr --model-config config.json"
            raise UserError("holds a zarr checkpoint", place=str(place), fix=fix)
        raise UserError(f"has no {METADATA}", place=str(place), fix="it is not complete")

    def locate(key: str) -> tuple[Mapped, int, int]:
        if key not in weights:
            raise UserError(f"has no {key}, which {METADATA} names", place=str(place), fix="it is not complete")
        return weights[key].file, weights[key].offset, weights[key].size

    items = torch_dist.items_in(place, weights[METADATA].bytes(), locate)
    rows = next((item.shape[0] for key, item in items.items() if _is_embedding(key)), None)
    if args and rows is not None:
        args = {"padded_vocab_size": rows, **args}
    said: dict[str, Any] = {"args": argparse.Namespace(**args)} if args else {}
    step = common.get("global_step")
    said |= {"iteration": step, "optimizer": common.get("optimizer_states") or common.get("optimizer")}
    files = sorted({member.file.path for member in weights.values()})
    source = distributed.build(name, place, items, said, options, files)
    source.training.args = {}  # Megatron's own; these were made of NeMo's
    if nemo_config.SCALING in args and options.config is None:
        source.model = source.model.with_(rope_scaling=dict(args[nemo_config.SCALING]))
    return source


def _is_embedding(key: str) -> bool:
    return key.endswith(_EMBEDDING) and not key.startswith(("optimizer.", "chained_"))


class NemoReader(Reader):
    """Reads archives and folders of NeMo 1.0 to 2.4."""

    format: ClassVar[str] = "nemo"

    def looks_like(self, path: Path) -> bool:
        return (path.is_file() and path.suffix == ".nemo") or (path / CONFIG).is_file()

    def read(self, path: Path, options: Options) -> Source:
        tree = Tree.of(path)
        config = nemo_config.plain_config(read_yaml(tree.need(CONFIG)))
        assets = _assets(tree, config)
        args = nemo_config.args_of(config) | _vocabulary(assets) | _memo(tree)
        weights = tree.folder(WEIGHTS)
        if weights:
            common = _common(weights)
            source = _distributed(self.format, path, weights, args, options, common)
        else:
            source = _files(self.format, path, tree, args, options)
        if options.optimizer:
            raise UserError("a .nemo file has no optimizer state", place=str(path), fix="leave out --with-optimizer")
        source.files = sorted({member.file.path for member in tree.members.values()})
        source.detail |= {"nemo_config": config}
        source.assets = assets
        return source


def _common(weights: Mapping[str, Member]) -> dict[str, Any]:
    """What common.pt holds; {} if there is none."""
    if COMMON not in weights:
        return {}
    member = weights[COMMON]
    found = torch_zip.read(member.file, member.offset, member.size)
    if not isinstance(found, dict):
        raise UserError("is no dict", place=member.place)
    return found


def _files(name: str, path: Path, tree: Tree, args: dict[str, Any], options: Options) -> Source:
    """Weights in one file, or one a rank."""
    ranks: dict[tuple[int, int], Member] = {}
    for key, member in tree.members.items():
        if match := PER_RANK.fullmatch(key):
            ranks[int(match[1] or match[2] or 0), int(match[3] or 0)] = member
        elif key == f"{WEIGHTS}.ckpt":
            ranks[0, 0] = member
    if not ranks:
        raise UserError(f"has no weights: neither {WEIGHTS}/ nor {WEIGHTS}.ckpt", place=str(path), fix="copy it again")
    layout = Layout(1 + max(tp for tp, _ in ranks), 1 + max(pp for _, pp in ranks))
    grid = {(tp, pp) for tp in range(layout.tp) for pp in range(layout.pp)}
    names = {at: ptl.folder_name(layout, *at) for at in grid}
    per_rank.check_grid(path, names.values(), [names[at] for at in ranks], layout)
    states = {}
    for at, member in ranks.items():
        state = torch_zip.read(member.file, member.offset, member.size)
        if not isinstance(state, dict):
            raise UserError("is no dict of tensors", place=member.place)
        states[at] = (path / member.name, {"state_dict": state.get("state_dict", state)})
    return ptl.build(name, path, states, args, layout, options)[0]


def _assets(tree: Tree, config: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizer files, without the hash that NeMo puts before their names."""
    found: dict[str, Any] = {}
    for key, member in tree.members.items():
        if "/" in key or key in (CONFIG, MEMO) or key.endswith(".ckpt"):
            continue
        match = _HASHED.fullmatch(key)
        name = match[1] if match else key
        if (config.get("tokenizer") or {}).get("model") == f"nemo:{key}" and name.endswith(".model"):
            name = "tokenizer.model"
        found[name] = _Inside(member)
    return found


_LIGHTNING_VERSION = {"pytorch-lightning_version": "2.4.0"}
_LIGHTNING = ("epoch", "loops", "callbacks", "lr_schedulers")


class NemoDistReader(Reader):
    """Reads what NeMo 1.x saves in training, optimizer state included. This backend's own checkpoints are such."""

    format: ClassVar[str] = "nemo_dist"

    def looks_like(self, path: Path) -> bool:
        if not ((path / METADATA).is_file() and (path / COMMON).is_file()):
            return False
        try:
            common = torch_zip.read(Mapped(path / COMMON))
        except UserError:
            return False
        return isinstance(common, dict) and "pytorch-lightning_version" in common

    def read(self, path: Path, options: Options) -> Source:
        tree = Tree.of(path)
        common = _common(tree.members)
        config = nemo_config.of_hyper_parameters(common.get("hyper_parameters"))
        memo = _kept(common)
        args = (
            nemo_config.args_of(config) | ptl.memo_args(memo)
            if config.get("num_layers") or config.get("encoder")
            else {}
        )
        source = _distributed(self.format, path, tree.members, args, options, common)
        source.detail |= {"nemo_config": config, "lightning": _progress(common)}
        source.training.consumed = ptl.consumed_of(path.name)
        if source.training.consumed is None and isinstance(memo, dict):
            source.training.consumed = memo.get("consumed")
        source.assets = dict(megatron.assets_of(path))
        return source


def _progress(common: Mapping[str, Any]) -> dict[str, Any]:
    return {key: common[key] for key in _LIGHTNING if key in common}


def _kept(common: Mapping[str, Any]) -> Any:
    """Our memo, from among the hyper-parameters: NeMo stops at a key of the dict that its own have not."""
    found = common.get("hyper_parameters")
    inner = found.get(ptl.MEMO) if isinstance(found, (dict, Inert)) else None
    return common.get(ptl.MEMO) if inner is None else inner


class Nemo2Reader(Reader):
    """Reads NeMo 2.0's folders. The model is that of context/model.yaml; nothing named there is imported."""

    format: ClassVar[str] = "nemo2"

    def looks_like(self, path: Path) -> bool:
        return (path / "weights" / METADATA).is_file() and (path / "context").is_dir()

    def read(self, path: Path, options: Options) -> Source:
        tree = Tree.of(path)
        context = _context(tree)
        described = _described(tree, context, options)
        config = described.get("config", {})
        weights = tree.folder("weights")
        common = _common(weights)
        args = nemo_config.two_args(config) | _memo(tree) if config else {}
        source = _distributed(self.format, path, weights, args, options, common)
        classes = {key: _class_in(context.get("model"), *names) for key, names in _CLASSES.items()} if context else {}
        source.detail |= {"nemo2_config": config, "nemo2_lightning": _progress(common), "nemo2_context": classes}
        source.detail["nemo2_model"] = _class_in(described)
        source.training.consumed = ptl.consumed_of(path.name)
        source.assets = _context_assets(tree, context)
        return source


# What `inspect` shows of context/io.json: where below its model a class is named.
_CLASSES: dict[str, tuple[str, ...]] = {"model": (), "config": ("config",), "tokenizer": ("tokenizer",)}
# Without these in io.json the class has them, which is not looked into.
_NEEDED = frozenset("num_layers hidden_size num_attention_heads normalization gated_linear_unit rotary_base".split())


def _context(tree: Tree) -> dict[str, Any]:
    """context/io.json; {} if there is none."""
    member = tree.members.get(IO)
    return {} if member is None else nemo_context.read(member.bytes(), member.place)


def _described(tree: Tree, context: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The model with its `config`: of context/model.yaml, which has every value, else of context/io.json."""
    member = tree.members.get("context/model.yaml")
    found = read_yaml(member) if member is not None else context.get("model")
    config = found.get("config") if isinstance(found, dict) else None
    if isinstance(found, dict) and isinstance(config, dict) and (member is not None or config.keys() >= _NEEDED):
        return found
    if member is None and options.config is not None:
        return {}
    if member is not None:
        raise UserError("has no config", place=member.place, fix="give the model's: --model-config config.json")
    said = f"has no context/model.yaml, and {IO} leaves values to classes" if context else "has no context/model.yaml"
    raise UserError(said, place=str(tree.path), fix="give the model's: --model-config config.json")


def _class_in(value: Any, *names: str) -> str:
    """The class that is named at a place of a tree; "" for none."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return str(value.get("_target_", "")) if isinstance(value, Mapping) else ""


def _context_assets(tree: Tree, context: Mapping[str, Any]) -> dict[str, Any]:
    """Files of the tokenizer and of generation, by their names."""
    found: dict[str, Any] = {}
    for key, member in tree.members.items():
        folder, _, name = key.rpartition("/")
        if folder == TOKENIZER or key == f"{ARTIFACTS}/{GENERATION}":
            found[name] = _Inside(member)
    model = context.get("model")
    tokenizer = model.get("tokenizer") if isinstance(model, Mapping) else None
    pieces = f"context/{tokenizer.get('model_path')}" if isinstance(tokenizer, Mapping) else ""
    if pieces in tree.members:
        found.setdefault("tokenizer.model", _Inside(tree.members[pieces]))
    return found


def _two_tokenizer(assets: Iterable[str]) -> dict[str, Any] | None:
    """NeMo's tokenizer of the files in context/nemo_tokenizer; None if they are not enough for one."""
    base, folder, names = "nemo.collections.common.tokenizers", PurePosixPath(TOKENIZER).name, set(assets)
    if "tokenizer_config.json" in names:
        return {"_target_": f"{base}.huggingface.auto_tokenizer.AutoTokenizer", "pretrained_model_name": folder}
    if "tokenizer.model" in names:
        kind = f"{base}.sentencepiece_tokenizer.SentencePieceTokenizer"
        return {"_target_": kind, "model_path": f"{folder}/tokenizer.model"}
    return None


def _vocabulary(assets: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens there are, by the tokenizer that lies beside; {} if it is none of SentencePiece."""
    if "tokenizer.model" not in assets:
        return {}
    data, at, count = assets["tokenizer.model"].read_bytes(), 0, 0
    while at < len(data) and data[at] == 0x0A:  # field 1 of ModelProto, a piece; all pieces come first
        at, size, shift = at + 1, 0, 0
        while at < len(data):
            size |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                break
        at, count = at + size, count + 1
    return {megatron_args.TRUE_VOCAB: count} if count else {}


@dataclass
class _Weights(TorchDistWriter):
    """The distributed part: NeMo's prefix, in a folder of its own, its dict in common.pt."""

    format: ClassVar[str] = "torch_dist"
    prefix: str = "model."
    where: str = WEIGHTS
    spec: str = ""
    content: dict[str, Any] = field(default_factory=dict)

    def folder(self) -> str:
        return self.where

    def common(self) -> dict[str, Any]:
        return self.content

    def files(self, source: Source, target: Target) -> tuple[list[Output], list[Output]]:
        """Files with tensors, and those that index them."""
        extra = {**target.extra, "optimizer_format": "model_space", "spec": self.spec or target.extra.get("spec")}
        target = Target(target.layout, target.dtype, target.kinds, target.divisible_by, extra)
        written = [_under(output) for output in self.outputs(source, target)]
        return written, [_under(output) for output in self.indexes()]


def _under(output: Output) -> Output:
    """The same with a normal path: no folder if it is to lie in the target itself."""
    return Output(str(PurePosixPath(output.path)), output.size, output.stream)


@dataclass
class NemoWriter(Writer):
    """Writes a `.nemo`: an archive if the target's name ends in .nemo, else its folder.

    Options: weights, `distributed` (megatron-core's GPT) or `file` (NeMo's own GPT, a file a rank).
    """

    format: ClassVar[str] = "nemo"
    single: ClassVar[str] = ".nemo"
    _last: list[Output] = field(default_factory=list)

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        if len(target.kinds) > 1:
            raise UserError("holds no optimizer state", place="--to nemo", fix="use --to nemo_dist, or weights alone")
        written, self._last = self._parts(source, target)
        if target.extra.get("single"):
            name = str(target.extra["single"])
            yield archive(name, [*self._last[-2:], *written, *self._last[:-2]])
            self._last = []
        else:
            yield from written

    def last(self) -> Iterable[Output]:
        return self._last

    def _parts(self, source: Source, target: Target) -> tuple[list[Output], list[Output]]:
        indexes: list[Output] = []
        by_file = target.extra.get("weights", "distributed") == "file"
        dtype = target.dtype or source.dtype
        if by_file:
            written = list(_by_file(source, target))
        else:
            written, indexes = _Weights().files(source, target)
        config = _section(source, target, dtype)
        if not source.model.decoder_layers:
            config["mcore_gpt"] = not by_file
        config |= {
            "make_vocab_size_divisible_by": target.divisible_by,
            "target": config.get("target") or _target(source),
        }
        assets, config["tokenizer"] = _tokenizer(source, config)
        memo = json.dumps(ptl.memo_of(source, source.model), default=str).encode()
        text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False).encode()
        return written, [*indexes, *assets, constant(MEMO, memo), constant(CONFIG, text)]


def is_gpt_by_rank(path: Path) -> bool:
    """True of a GPT's `.nemo` with a file a rank, which NeMo reads at their layout only."""
    tree = Tree.of(path)
    if tree.folder(WEIGHTS):
        return False
    target = str(read_yaml(tree.need(CONFIG)).get("target") or _TARGET)
    return target.rpartition(".")[2].startswith("MegatronGPT")


def _section(source: Source, target: Target, dtype: DType) -> dict[str, Any]:
    """The `model:` section, over the one that the source had."""
    kept = source.detail.get("nemo_config")
    if source.model.decoder_layers:
        return nemo_config.t5_config(source.model, target.layout, kept or {}, dtype)
    return nemo_config.config_of(source.model, target.layout, kept or nemo_config.TEMPLATE, dtype)


def _target(source: Source) -> str:
    return _TARGET if not source.model.decoder_layers else _TARGET.replace("gpt", "t5").replace("GPT", "T5")


_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"


def _by_file(source: Source, target: Target) -> Iterator[Output]:
    """NeMo's own GPT: a state dict a rank."""
    writer = ptl.PTLWriter()
    for output in writer.state_dicts(source, target):
        folder = PurePosixPath(output.path).parent
        yield Output(str(folder / f"{WEIGHTS}.ckpt"), output.size, output.stream)


def _tokenizer(source: Source, config: Mapping[str, Any]) -> tuple[list[Output], dict[str, Any]]:
    """Tokenizer files as NeMo's artifacts, and the section that names them."""
    section = dict(config.get("tokenizer") or nemo_config.TEMPLATE["tokenizer"])
    outputs = []
    for name, asset in source.assets.items():
        content = asset.read_bytes()
        if name == "tokenizer.model" or f"_{name}" in str(section.get("model")):
            hashed = f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}_{name}"
            outputs.append(constant(hashed, content))
            section |= {"library": "sentencepiece", "model": f"nemo:{hashed}"}
    if not outputs and not source.detail.get("nemo_config") and source.assets:
        section |= {"library": "huggingface", "type": str(source.path)}
    return outputs, section


def archive(path: str, outputs: Iterable[Output]) -> Output:
    """One tar file that holds these, in this order."""
    members = list(outputs)
    folders = sorted(
        {str(parent) for one in members for parent in PurePosixPath(one.path).parents if str(parent) != "."}
    )
    heads = [tar.header(folder, 0, folder=True) for folder in folders]

    def stream() -> Iterator[Bytes]:
        yield from heads
        for member in members:
            yield tar.header(member.path, member.size)
            yield from member.stream()
            yield b"\0" * (-member.size % tar.BLOCK)
        yield b"\0" * tar.BLOCK * 2

    size = sum(map(len, heads)) + 2 * tar.BLOCK
    size += sum(len(tar.header(one.path, one.size)) + one.size + -one.size % tar.BLOCK for one in members)
    return Output(path, size, stream)


@dataclass
class NemoDistWriter(Writer):
    """Writes what NeMo 1.x resumes training from. Optimizer state is by parameter name, whichever optimizer had it.

    Options: groups, how many parameter groups the optimizer has that will read it; the source's by default.
    """

    format: ClassVar[str] = "nemo_dist"
    _last: list[Output] = field(default_factory=list)

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        weights = _Weights(where=".")
        dtype = target.dtype or source.dtype
        training = source.training
        config = _section(source, target, dtype)
        config["make_vocab_size_divisible_by"] = target.divisible_by
        step = training.iteration or 0
        weights.content = {
            "epoch": 0,
            "global_step": step,
            **_LIGHTNING_VERSION,
            "state_dict": {},
            "loops": _loops(step),
            "callbacks": {},
            "hparams_name": "cfg",
            "hyper_parameters": {"cfg": nemo_config.structured(config), ptl.MEMO: ptl.memo_of(source, source.model)},
        }
        written, _ = weights.files(source, target)
        if len(target.kinds) > 1:
            weights.content["optimizer_states"] = [_optimizer(source, target, dtype)]
            weights.content["lr_schedulers"] = [{"last_epoch": step, "_step_count": step + 1}]
        # A run of NeMo's goes on as it was.
        weights.content |= source.detail.get("lightning", {})
        self._last = [*megatron.asset_outputs(source), *(_under(output) for output in weights.indexes())]
        return written

    def last(self) -> Iterable[Output]:
        return self._last


def _optimizer(source: Source, target: Target, dtype: DType) -> dict[str, Any]:
    """The optimizer's state without its tensors."""
    training = source.training
    kept = _fitted(training.groups, int(target.extra.get("groups", len(training.groups))))
    state: dict[str, Any] = {"param_groups": [{**group, "step": training.step} for group in kept]}
    return state if dtype == FLOAT32 else {"optimizer": state}


def _fitted(groups: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """As many groups as the optimizer has: those with weight decay first, as NeMo orders them."""
    decays = sorted(groups, key=lambda group: not (group.get("weight_decay") and group.get("wd_mult", 1.0)))
    if count == len(groups) or not groups:
        return groups
    return decays[:count] if count < len(decays) else [*decays, *[decays[-1]] * (count - len(decays))]


@dataclass
class Nemo2Writer(Writer):
    """Writes a NeMo 2.0 folder, to restore weights from, or with optimizer state to go on from.

    `weights/`, and `context/`: io.json, of which NeMo rebuilds the model, model.yaml, a tokenizer's files.
    Options: groups, as NemoDistWriter's.
    """

    format: ClassVar[str] = "nemo2"
    _last: list[Output] = field(default_factory=list)

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        dtype = target.dtype or source.dtype
        content: dict[str, Any] = {"epoch": 0, "global_step": 0, "state_dict": {}, **_LIGHTNING_VERSION}
        if len(target.kinds) > 1:
            step = source.training.iteration or 0
            content |= {"global_step": step, "loops": _loops(step), "callbacks": {}, "lr_schedulers": []}
            content |= {"optimizer_states": {}, "optimizer": [_optimizer(source, target, dtype)]}
            content |= source.detail.get("nemo2_lightning", {})
        weights = _Weights(prefix="module.", where="weights", spec="te", content=content)
        written, indexes = weights.files(source, target)
        kept = source.detail.get("nemo2_config") or {}
        config = nemo_config.two_config(source.model, target.layout, kept, dtype, target.divisible_by)
        tokenizer = _two_tokenizer(source.assets)
        generation = nemo_config.generation(PurePosixPath(ARTIFACTS).name)
        config["generation_config"] = generation if GENERATION in source.assets else None
        if tokenizer is None or source.family.name in nemo_config.VOCABULARY:
            config["vocab_size"] = source.model.vocab
        model = nemo_config.two_model(source.model, config, source.detail.get("nemo2_model", ""), tokenizer)
        memo = json.dumps(ptl.memo_of(source, source.model), default=str).encode()
        self._last = [
            *(
                constant(f"{ARTIFACTS if name == GENERATION else TOKENIZER}/{name}", asset.read_bytes())
                for name, asset in source.assets.items()
            ),
            constant("context/model.yaml", yaml.safe_dump(model, sort_keys=False).encode()),
            constant(IO, nemo_context.write(nemo_config.two_context(model))),
            constant(MEMO, memo),
            *indexes,
        ]
        return written

    def last(self) -> Iterable[Output]:
        return self._last


def _loops(step: int) -> dict[str, Any]:
    """Lightning's progress of a run that has made so many steps in its first epoch."""

    def progress(*names: str) -> dict[str, Any]:
        return {key: dict.fromkeys(names, step) for key in ("total", "current")}

    batch = ("ready", "completed", "started", "processed")
    optimizer = {"step": progress("ready", "completed"), "zero_grad": progress("ready", "completed", "started")}
    fit = {
        "state_dict": {},
        "epoch_progress": {
            key: {"ready": 1, "completed": 0, "started": 1, "processed": 0} for key in ("total", "current")
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.batch_progress": {**progress(*batch), "is_last_batch": False},
        "epoch_loop.scheduler_progress": progress("ready", "completed"),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": progress("ready", "completed"),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": {
            **{key: dict.fromkeys(batch, 0) for key in ("total", "current")},
            "is_last_batch": False,
        },
    }
    return {"fit_loop": fit}


READERS = {"nemo": NemoReader, "nemo2": Nemo2Reader, "nemo_dist": NemoDistReader}
WRITERS = {"nemo": NemoWriter, "nemo2": Nemo2Writer, "nemo_dist": NemoDistWriter}
