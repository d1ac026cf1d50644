"""From the undivided model's tensors to each rank's and back, by the marks that upstream puts on parameters.

Room testing/. Imports torch; the model is anything with names like GPTModel's. Reads tensor_model_parallel,
partition_dim and partition_stride, as megatron.core.tensor_parallel.layers sets them, and run, as our
tensor_parallel/layers.py does where KV heads have copies. Written apart from the checkpoint room's tables, so that a
mistake there is not repeated here. Proof: tests/testing/test_weights.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Piece", "Ranks", "global_names", "load", "merge", "piece", "share"]


@dataclass(frozen=True)
class Piece:
    """What rank `rank` of `size` tensor-parallel ones (an expert's: of its own) holds of a tensor.

    dim    the divided dimension; None for a copy of the whole
    gated  the rank's part is [gate; up], both divided (SwiGLU's first matrix), not one run of rows
    run    (start, stop) along dim, where that is not this rank's equal part: other ranks may have a copy of it
    """

    tensor: torch.Tensor
    dim: int | None
    gated: bool
    rank: int
    size: int
    run: tuple[int, int] | None = None


@dataclass(frozen=True)
class Ranks:
    """Where a rank stands: (rank, size) in tensor parallelism, in the experts' own, and in expert parallelism."""

    tp: tuple[int, int] = (0, 1)
    etp: tuple[int, int] = (0, 1)
    ep: tuple[int, int] = (0, 1)

    @classmethod
    def here(cls) -> Ranks:
        """This rank's, as megatron-core's parallel state has them."""
        from megatron.core import parallel_state as state

        tp = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
        etp = state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()
        return cls(tp, etp, (state.get_expert_model_parallel_rank(), state.get_expert_model_parallel_world_size()))


def global_names(model: Any, known: Iterable[str], ranks: Ranks | None = None) -> Iterator[tuple[str, Any]]:
    """(name in the undivided model, parameter) of each parameter of one pipeline stage, or of a list of its chunks.

    Layers are renumbered from the stage's to the whole model's, and experts from the rank's to all; a tied output
    layer, which a last stage keeps as a copy of its own, is the embedding (known holds the undivided model's names);
    the key and value rows that a rank has a copy of are part of the fused projection; each expert of a GroupedMLP has
    matrices of its own, see ExpertMatrix.
    """
    names, ep_rank = set(known), ranks.ep[0] if ranks else 0
    for chunk in model if isinstance(model, list) else [model]:
        for local, parameter in _apart(chunk):
            if local.startswith("lm_head.") and getattr(chunk, "decoder", True) is None:
                continue  # the last stage of a T5's encoder has a head that nothing uses
            name = _renumbered(chunk, local, ep_rank).replace(".linear_qkv.kv_", ".linear_qkv.")
            if name.endswith("output_layer.weight") and name not in names:
                name = "embedding.word_embeddings.weight"
            if name not in names:
                raise KeyError(f"{name} is no parameter of the undivided model")
            yield name, parameter


@dataclass(frozen=True)
class ExpertMatrix:
    """One expert's matrix in a GroupedMLP's parameter of E of them, oriented and marked as SequentialMLP's.

    whole      [H, E O] or [E I, H], whose memory is [E, rows, columns]
    rows       of an expert
    divided    the dimension of the expert's [columns, rows] that tensor-parallel ranks share
    """

    whole: Any
    expert: int
    experts: int
    rows: int
    divided: int
    tensor_model_parallel: bool = True
    partition_stride: int = 1

    @property
    def partition_dim(self) -> int:
        return self.divided

    @property
    def shape(self) -> torch.Size:
        return self.detach().shape

    @property
    def main_grad(self) -> torch.Tensor:
        return self._of(self.whole.main_grad)

    @property
    def grad(self) -> torch.Tensor | None:
        return None if self.whole.grad is None else self._of(self.whole.grad)

    def detach(self) -> torch.Tensor:
        return self._of(self.whole.detach())

    def copy_(self, values: torch.Tensor) -> torch.Tensor:
        return self.detach().copy_(values)

    def _of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.view(self.experts, self.rows, -1)[self.expert].t()


_GROUPED = re.compile(r"\.experts\.weight([12])$")


def _apart(chunk: Any) -> Iterator[tuple[str, Any]]:
    """named_parameters, those of grouped experts one by one."""
    for name, parameter in chunk.named_parameters():
        found = _GROUPED.search(name)
        if found is None:
            yield name, parameter
            continue
        module = chunk.get_submodule(name.rpartition(".")[0])
        experts = module.num_local_experts
        rows = parameter.shape[0] if found[1] == "1" else parameter.shape[0] // experts
        for expert in range(experts):
            matrix = ExpertMatrix(parameter, expert, experts, rows, 0 if found[1] == "1" else 1)
            yield _GROUPED.sub(f".experts.local_experts.{expert}.linear_fc{found[1]}.weight", name), matrix


_LAYER = re.compile(r"(?<=coder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


def _renumbered(chunk: Any, name: str, ep_rank: int) -> str:
    if _LAYER.search(name):
        name = _LAYER.sub(lambda found: str(int(found[0]) + _offset(chunk, name)), name)
    if _EXPERT.search(name):
        name = _EXPERT.sub(lambda found: str(int(found[0]) + _experts(chunk) * ep_rank), name)
    return name


def _offset(chunk: Any, name: str) -> int:
    """Layers before this chunk's, in the block that a parameter belongs to."""
    return int(getattr(chunk, name.partition(".")[0]).layers[0].layer_number) - 1


def _experts(chunk: Any) -> int:
    """Experts of a layer that a rank has."""
    return next(int(module.num_local_experts) for module in chunk.modules() if hasattr(module, "num_local_experts"))


def share(whole: torch.Tensor, dim: int | None, gated: bool, size: int, rank: int) -> torch.Tensor:
    """Rank `rank` of `size`'s part of a tensor. Raises ValueError when size does not divide it."""
    import torch

    if dim is None or size == 1:
        return whole
    if whole.shape[dim] % (size * (2 if gated else 1)):
        raise ValueError(f"{size} tensor-parallel ranks do not divide dimension {dim} of {tuple(whole.shape)}")
    halves = whole.chunk(2, dim) if gated else (whole,)
    return torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)


def piece(name: str, parameter: Any, tensor: torch.Tensor, gated_model: bool, ranks: Ranks) -> Piece:
    """The tensor (this parameter's value or gradient) with what merge needs to know."""
    run = getattr(parameter, "run", None)
    divided = run is not None or bool(getattr(parameter, "tensor_model_parallel", False))
    if divided and parameter.partition_stride != 1:
        raise ValueError(f"{name}: partition_stride {parameter.partition_stride} is not handled")
    gated = gated_model and _GATED.search(name) is not None
    place = ranks.etp if ".local_experts." in name else ranks.tp
    return Piece(tensor.detach().cpu().clone(), parameter.partition_dim if divided else None, gated, *place, run)


_GATED = re.compile(r"\.mlp\.(?:experts\.local_experts\.\d+\.)?linear_fc1\.")


def load(model: Any, weights: dict[str, torch.Tensor], gated: bool, ranks: Ranks) -> None:
    """Copy this rank's part of each of the undivided model's weights into one pipeline stage, or its chunks."""
    import torch

    with torch.no_grad():
        for name, parameter in global_names(model, weights, ranks):
            place = piece(name, parameter, parameter, gated, ranks)
            if place.run is not None and place.dim is not None:
                part = weights[name].narrow(place.dim, place.run[0], place.run[1] - place.run[0])
            else:
                part = share(weights[name], place.dim, place.gated, place.size, place.rank)
            if part.shape != parameter.shape:
                raise ValueError(f"{name}: {tuple(part.shape)} does not fit {tuple(parameter.shape)}")
            parameter.copy_(part)


def merge(ranks: list[list[tuple[str, Piece]]]) -> tuple[dict[str, torch.Tensor], float]:
    """Put the pieces of all ranks together.

    Returns the undivided tensors, and the largest difference between two copies of one piece (data-parallel
    replicas, undivided parameters, a tied embedding's two ends, KV heads), relative to the piece's largest element:
    copies that drift apart are an error too, even when the first of them is right.
    """
    import torch

    copies: dict[str, dict[Any, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for name, found in (pair for rank in ranks for pair in rank):
        copies[name][(found.run or found.rank) if found.dim is not None else 0].append(found)
    spread, whole = 0.0, {}
    for name, places in copies.items():
        for held in places.values():
            first = held[0].tensor
            worst = max(float((other.tensor - first).abs().max()) for other in held)
            spread = max(spread, worst / max(float(first.abs().max()), 1e-30))
        kind = next(iter(places.values()))[0]
        if kind.dim is None or kind.size == 1:
            whole[name] = kind.tensor
            continue
        if kind.run is not None:
            whole[name] = torch.cat([places[run][0].tensor for run in _consecutive(name, places)], kind.dim)
            continue
        parts = [places[rank][0].tensor for rank in range(kind.size)]
        runs = [part.chunk(2, kind.dim) if kind.gated else (part,) for part in parts]
        whole[name] = torch.cat([torch.cat(half, kind.dim) for half in zip(*runs, strict=True)], kind.dim)
    return whole, spread


def _consecutive(name: str, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs in order. Raises ValueError unless they leave nothing out and do not overlap."""
    ordered = sorted(runs)
    if [start for start, _ in ordered] != [0, *(stop for _, stop in ordered[:-1])]:
        raise ValueError(f"{name}: {ordered} do not follow each other")
    return ordered
