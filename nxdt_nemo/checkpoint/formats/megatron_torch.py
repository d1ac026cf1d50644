"""Megatron-LM's `torch` format: a folder and a `model_optim_rng.pt` for each model-parallel rank.

Room checkpoint/ (leaf). As megatron/training/checkpointing.py (core_v0.13.1) writes it, and older trees
(dialects/megatron_legacy.py). Optimizer state has no names there: megatron_optimizer.py finds them.
May import this room. Proof: tests/checkpoint/test_fixtures.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nxdt_nemo.checkpoint.catalog import Catalog
from nxdt_nemo.checkpoint.dialects import megatron_args
from nxdt_nemo.checkpoint.dialects.megatron_core import PER_RANK, PER_RANK_TE
from nxdt_nemo.checkpoint.dialects.megatron_legacy import legacy
from nxdt_nemo.checkpoint.formats import megatron, megatron_optimizer, per_rank, ptl
from nxdt_nemo.checkpoint.formats.base import Options, Output, Reader, Source, Target, Writer, constant, zipped
from nxdt_nemo.checkpoint.formats.megatron import FILE, flat, folder_name
from nxdt_nemo.checkpoint.formats.megatron_optimizer import SHARDED
from nxdt_nemo.checkpoint.formats.per_rank import Held
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Files
from nxdt_nemo.checkpoint.layout import Layout, Shard, padded
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.placement import Dialect, Stored, copied, rows_of
from nxdt_nemo.errors import UserError

__all__ = ["READERS", "WRITERS", "MegatronTorchReader", "MegatronTorchWriter"]

# Positions that a run starts with differ, and stay so; untied word embeddings get only their own side's gradients.
_TWO_SIDES = ", or this T5 was begun in stages, where Megatron-LM gives each side embeddings of its own"
_ORDER = ", or key-value heads are in the order of trn1, where neighbouring ranks have no copies"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


@dataclass
class _Rank:
    """A rank's file, read: tensors as Extents."""

    path: Path
    state: Mapping[str, Any]

    def chunk(self, number: int, layout: Layout) -> dict[str, Any]:
        """The state of a virtual stage, nested keys joined by dots."""
        key = f"model{number}" if layout.vpp > 1 else "model"
        if key not in self.state:
            have = ", ".join(name for name in self.state if str(name).startswith("model")) or "none"
            raise UserError(f"has no {key}; of models it has {have}", place=str(self.path), fix="give --vpp as it was")
        return dict(flat(self.state[key]))


class MegatronTorchReader(Reader):
    """Reads megatron-core's and older state, any checkpoint_version, both forms of optimizer state."""

    format = "torch"

    def looks_like(self, path: Path) -> bool:
        try:
            folder = megatron.folder_of(path, None)
            return any(_RANK.fullmatch(at.name) for at in folder.iterdir())
        except (UserError, OSError):
            return False

    def read(self, path: Path, options: Options) -> Source:
        folder = megatron.folder_of(path, options.step)
        files = Files()
        names = sorted(at.name for at in folder.iterdir() if _RANK.fullmatch(at.name))
        if not names:
            raise UserError("has no mp_rank_XX", place=str(folder), fix="name the folder that has them")
        first = _open(folder / names[0], files)
        training = megatron.training_of(first.state, folder)
        layout = megatron_args.layout_of(training.args) if training.args else _guess(names)
        wanted = {folder_name(layout, tp, pp, ep) for pp in range(layout.pp) for tp, ep, _ in layout.grid()}
        per_rank.check_grid(folder, wanted, names, layout, by="its arguments")
        ranks = {name: first if name == names[0] else _open(folder / name, files) for name in names}
        _check_same(ranks)
        model = megatron.model_of(training.args, options, str(folder))
        if options.config is None:
            model = megatron.by_tensors(model, _shapes(ranks.values(), layout), layout)
        dialect = _dialect(first, layout, model)
        model = _believe(model, ranks, layout, options)
        family = megatron.family_of(model, str(folder))
        model = model.with_(family=family.name).check(str(folder))
        layout.check(model.layers, model.experts, model.decoder_layers)
        source = Source(self.format, folder, family, model, Catalog(), layout, training)
        hint = _TWO_SIDES if layout.encoder else _ORDER if copied(model, layout) else ""
        per_rank.collect(source, dialect, _shards(model, layout, ranks), local=True, by="arguments", hint=hint)
        if options.optimizer:
            megatron_optimizer.collect(source, {name: rank.state for name, rank in ranks.items()}, dialect, files)
        source.assets = megatron.assets_of(folder)
        source.files = sorted(file.path for file in files)
        source.detail = {"checkpoint_version": first.state.get("checkpoint_version"), "ranks": names}
        return source


def _shapes(ranks: Iterable[_Rank], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Of all arrays of all ranks, by key: layers have the numbers of one of the ranks."""
    chunks = (rank.chunk(chunk, layout) for rank in ranks for chunk in range(layout.vpp))
    return {key: value.shape for chunk in chunks for key, value in chunk.items() if isinstance(value, Extent)}


def _open(folder: Path, files: Files) -> _Rank:
    path = folder / FILE
    state = torch_zip.read(files(path))
    if not isinstance(state, dict):
        raise UserError("is no dict", place=str(path))
    return _Rank(path, state)


def _guess(names: Sequence[str]) -> Layout:
    """The layout that the names of folders say, if no arguments do: a second number is a stage."""
    found = [match for name in names if (match := _RANK.fullmatch(name))]
    return Layout(
        tp=1 + max(int(match[1]) for match in found),
        pp=1 + max(int(match[2] or 0) for match in found),
        ep=1 + max(int(match[3] or 0) for match in found),
    )


def _check_same(ranks: Mapping[str, _Rank]) -> None:
    """Raises UserError if ranks are of different steps or versions."""
    for key in ("iteration", "checkpoint_version"):
        found = {name: rank.state.get(key) for name, rank in ranks.items()}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name} {value}" for name, value in list(found.items())[:4])
            place = str(next(iter(ranks.values())).path.parent.parent)
            raise UserError(f"ranks differ in {key}: {said}", place=place, fix="files of two saves are mixed")


def _dialect(first: _Rank, layout: Layout, model: Model) -> Dialect:
    """The dialect of the names that are there. Raises UserError for a checkpoint_version that is not known."""
    version = first.state.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version > 3 or version < 0:
        raise UserError(f"checkpoint_version is {version!r}", place=str(first.path), fix="0 to 3 are known")
    keys = first.chunk(0, layout)
    if not any(key.startswith("language_model.") for key in keys):
        return PER_RANK_TE if any("layer_norm_weight" in key for key in keys) else PER_RANK
    if version < 2 and model.groups != model.heads:
        reason = f"checkpoint_version {version} has no grouped queries, its arguments say {model.groups} groups"
        raise UserError(reason, place=str(first.path))
    return legacy(float(version))


def _believe(model: Model, ranks: Mapping[str, _Rank], layout: Layout, options: Options) -> Model:
    """The model with the vocabulary that the embedding has."""
    rank = ranks[folder_name(layout, 0, 0, 0)]
    found = [value for key, value in rank.chunk(0, layout).items() if key.endswith("word_embeddings.weight")]
    if not found or not isinstance(found[0], Extent):
        raise UserError("has no word embeddings", place=str(rank.path), fix="it is not the first stage's file")
    rows = found[0].shape[0] * layout.tp
    if options.config is None and options.vocab is None and model.padded_vocab not in (0, rows):
        reason = f"the embedding has {rows} rows on {layout.tp} ranks, padded_vocab_size is {model.padded_vocab}"
        raise UserError(reason, place=str(rank.path), fix="say what the vocabulary is: --vocab-size")
    vocab = options.vocab or model.vocab
    if vocab > rows:
        raise UserError(f"a vocabulary of {vocab} for {rows} rows", place=str(rank.path), fix="correct --vocab-size")
    return model.with_(vocab=vocab, padded_vocab=rows)


def _shards(model: Model, layout: Layout, ranks: Mapping[str, _Rank]) -> Iterator[tuple[Shard, Held]]:
    """Each model, or virtual stage, of each rank."""
    for shard in layout.shards(model.layers, model.experts):
        rank = ranks[folder_name(layout, shard.tp, shard.pp, shard.ep)]
        yield shard, Held(rank.path, rank.chunk(shard.chunk, layout))


class MegatronTorchWriter(Writer):
    """Writes megatron-core's names, and the state of either of Megatron's optimizers.

    Options: spec, `local` or `te`, the layer spec of the run that will load it, or `legacy`, the names of a run with
    --use-legacy-models; optimizer_format, `distrib_optim` for
    Megatron's distributed optimizer, else the other one's; dp, its data-parallel ranks, which its buffers' length may
    depend on; bucket_size, in elements, of a run with --overlap-grad-reduce; encoder_pp, of the stages of a T5 those of
    its encoder, half of them if it is not said.
    """

    format = "torch"

    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        target = replace(target, layout=_with_sides(source.model, target))
        layout = target.layout.check(source.model.layers, source.model.experts, source.model.decoder_layers)
        self._source = source
        model = source.model.with_(padded_vocab=padded(source.model.vocab, target.divisible_by, layout.tp))
        spec = target.extra.get("spec", "local")
        dialect = {"te": PER_RANK_TE, "local": PER_RANK, "legacy": legacy(3.0)}[spec]
        if spec == "legacy" and (model.decoder_layers or model.experts or model.qk_norm or copied(model, layout)):
            reason = f"names before megatron-core have no place for what {source.family.name} has"
            raise UserError(reason, place="--spec legacy", fix="use --spec local")
        dtype = target.dtype or source.dtype
        args = megatron.args_for(source, model, layout, dtype)
        sharded = len(target.kinds) > 1 and target.extra.get("optimizer_format") == megatron_optimizer.DISTRIBUTED
        if sharded and copied(model, layout):  # megatron-core makes no copies, this backend no such file
            reason = f"tp={layout.tp} for {model.groups} key-value heads: no optimizer has such a {SHARDED} of copies"
            raise UserError(reason, place="--to torch", fix="use torch_dist, or leave out --optimizer-format")
        args.use_distributed_optimizer = sharded
        args.use_legacy_models = spec == "legacy"
        if sharded:
            args.data_parallel_size = int(target.extra.get("dp", getattr(args, "data_parallel_size", 1)))
            if size := target.extra.get("bucket_size"):
                args.overlap_grad_reduce, args.ddp_bucket_size = True, int(size)
        folder = megatron.iteration_name(source.training.iteration)
        # Of groups of experts that share a slice of the dense parameters, the first has its state.
        first = {(tp, min(ep for other, ep, _ in layout.grid() if other == tp)) for tp, _, _ in layout.grid()}
        for pp in range(layout.pp):
            for tp, ep, etp in layout.grid():
                each = model.experts // layout.ep
                experts = range(ep * each, (ep + 1) * each)
                shards = [layout.shard(model.layers, tp, pp, chunk, ep, experts, etp) for chunk in range(layout.vpp)]
                value, chunks = _rank_state(source, target, model, dialect, shards, args)
                place = f"{folder}/{folder_name(layout, tp, pp, ep)}"
                yield zipped(f"{place}/{FILE}", value)
                if sharded:
                    cuts = [
                        megatron_optimizer.Buckets.of(vars(args), model, layout, pp, first=not pp and not chunk)
                        for chunk in range(layout.vpp)
                    ]
                    buffers = megatron_optimizer.buffers_of(source, target, chunks, cuts, dense=(tp, ep) in first)
                    yield zipped(f"{place}/{SHARDED}", buffers)

    def last(self) -> Iterable[Output]:
        iteration = self._source.training.iteration
        yield from megatron.asset_outputs(self._source)
        yield constant(megatron.TRACKER, b"release" if iteration is None else str(iteration).encode())


def _with_sides(model: Model, target: Target) -> Layout:
    """The target's layout; of the stages of a T5, which are its encoder's."""
    layout = target.layout
    if not model.decoder_layers or layout.pp == 1:
        return layout
    encoder = target.extra.get("encoder_pp", layout.pp // 2)
    if not isinstance(encoder, int) or encoder < 1:
        raise UserError(f"encoder_pp={encoder} is no number of stages", place="--option", fix="use 1 or more")
    return replace(layout, encoder=encoder)


def _rank_state(
    source: Source, target: Target, model: Model, dialect: Dialect, shards: Sequence[Shard], args: argparse.Namespace
) -> tuple[dict[str, Any], list[list[Stored]]]:
    """What a rank's file holds, and the parameters of each of its virtual stages."""
    training, layout = source.training, target.layout
    state: dict[str, Any] = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": training.iteration or 0,
        "num_floating_point_operations_so_far": 0,
    }
    chunks: list[list[Stored]] = []
    for number, shard in enumerate(shards):
        found = list(rows_of(dialect, model, source.names, shard, layout))
        key = f"model{number}" if layout.vpp > 1 else "model"
        arrays = {stored.key: per_rank.pending(source, "model", stored, target.dtype) for stored in found}
        state[key] = ptl.nested(arrays) if args.use_legacy_models else arrays
        chunks.append(per_rank.once(found))
    if len(target.kinds) > 1:
        state["optimizer"] = megatron_optimizer.state_of(source, target, [stored for some in chunks for stored in some])
    if training.scheduler:
        state["opt_param_scheduler"] = training.scheduler
    return state, chunks


READERS = {"torch": MegatronTorchReader}
WRITERS = {"torch": MegatronTorchWriter}
