"""From the undivided model's tensors to each rank's and back, by the marks that upstream puts on parameters.

Room testing/. Imports torch; the model is anything with GPTModel's names. Reads tensor_model_parallel, partition_dim
and partition_stride, as megatron.core.tensor_parallel.layers sets them, and run, as our tensor_parallel/layers.py does
where KV heads have copies. Written apart from the checkpoint room's
tables, so that a mistake there is not repeated here. Proof: tests/testing/test_weights.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Piece", "global_names", "load", "merge", "piece", "share"]


@dataclass(frozen=True)
class Piece:
    """What one tensor-parallel rank holds of a tensor.

    dim    the divided dimension; None for a copy of the whole
    gated  the rank's part is [gate; up], both divided (SwiGLU's first matrix), not one run of rows
    run    (start, stop) along dim, where that is not this rank's equal part: other ranks may have a copy of it
    """

    tensor: torch.Tensor
    dim: int | None
    gated: bool
    tp_rank: int
    run: tuple[int, int] | None = None


def global_names(model: Any, known: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name in the undivided model, parameter) of each parameter of one pipeline stage.

    Layers are renumbered from the stage's to the whole model's; a tied output layer, which a last stage keeps as a
    copy of its own, is the embedding (known holds the undivided model's names); the key and value rows that a rank has
    a copy of are part of the fused projection.
    """
    names = set(known)
    layers = getattr(model.decoder, "layers", None) or []
    offset = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in model.named_parameters():
        name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + offset), name)
        name = name.replace(".linear_qkv.kv_", ".linear_qkv.")
        if name == "output_layer.weight" and name not in names:
            name = "embedding.word_embeddings.weight"
        if name not in names:
            raise KeyError(f"{name} is no parameter of the undivided model")
        yield name, parameter


def share(whole: torch.Tensor, dim: int | None, gated: bool, size: int, rank: int) -> torch.Tensor:
    """Rank `rank` of `size`'s part of a tensor. Raises ValueError when size does not divide it."""
    import torch

    if dim is None or size == 1:
        return whole
    if whole.shape[dim] % (size * (2 if gated else 1)):
        raise ValueError(f"{size} tensor-parallel ranks do not divide dimension {dim} of {tuple(whole.shape)}")
    halves = whole.chunk(2, dim) if gated else (whole,)
    return torch.cat([half.chunk(size, dim)[rank] for half in halves], dim)


def piece(name: str, parameter: Any, tensor: torch.Tensor, gated_model: bool, tp_rank: int) -> Piece:
    """The tensor (this parameter's value or gradient) with what merge needs to know."""
    run = getattr(parameter, "run", None)
    divided = run is not None or bool(getattr(parameter, "tensor_model_parallel", False))
    if divided and parameter.partition_stride != 1:
        raise ValueError(f"{name}: partition_stride {parameter.partition_stride} is not handled")
    gated = gated_model and ".mlp.linear_fc1." in name
    return Piece(tensor.detach().clone(), parameter.partition_dim if divided else None, gated, tp_rank, run)


def load(model: Any, weights: dict[str, torch.Tensor], gated: bool, tp_size: int, tp_rank: int) -> None:
    """Copy this rank's part of each of the undivided model's weights into one pipeline stage."""
    import torch

    with torch.no_grad():
        for name, parameter in global_names(model, weights):
            place = piece(name, parameter, parameter, gated, tp_rank)
            if place.run is not None and place.dim is not None:
                part = weights[name].narrow(place.dim, place.run[0], place.run[1] - place.run[0])
            else:
                part = share(weights[name], place.dim, place.gated, tp_size, tp_rank)
            if part.shape != parameter.shape:
                raise ValueError(f"{name}: {tuple(part.shape)} does not fit {tuple(parameter.shape)}")
            parameter.copy_(part)


def merge(ranks: list[list[tuple[str, Piece]]], tp_size: int) -> tuple[dict[str, torch.Tensor], float]:
    """Put the pieces of all ranks together.

    Returns the undivided tensors, and the largest difference between two copies of one piece (data-parallel
    replicas, undivided parameters, a tied embedding's two ends, KV heads), relative to the piece's largest element:
    copies that drift apart are an error too, even when the first of them is right.
    """
    import torch

    copies: dict[str, dict[Any, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for name, found in (pair for rank in ranks for pair in rank):
        copies[name][(found.run or found.tp_rank) if found.dim is not None else 0].append(found)
    spread, whole = 0.0, {}
    for name, places in copies.items():
        for held in places.values():
            first = held[0].tensor
            worst = max(float((other.tensor - first).abs().max()) for other in held)
            spread = max(spread, worst / max(float(first.abs().max()), 1e-30))
        kind = next(iter(places.values()))[0]
        if kind.dim is None or tp_size == 1:
            whole[name] = kind.tensor
            continue
        if kind.run is not None:
            whole[name] = torch.cat([places[run][0].tensor for run in _consecutive(name, places)], kind.dim)
            continue
        parts = [places[rank][0].tensor for rank in range(tp_size)]
        runs = [part.chunk(2, kind.dim) if kind.gated else (part,) for part in parts]
        whole[name] = torch.cat([torch.cat(half, kind.dim) for half in zip(*runs, strict=True)], kind.dim)
    return whole, spread


def _consecutive(name: str, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs in order. Raises ValueError unless they leave nothing out and do not overlap."""
    ordered = sorted(runs)
    if [start for start, _ in ordered] != [0, *(stop for _, stop in ordered[:-1])]:
        raise ValueError(f"{name}: {ordered} do not follow each other")
    return ordered
