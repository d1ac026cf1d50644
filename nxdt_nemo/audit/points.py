"""The small steps that stand for a large one: few layers a stage, few micro-batches, and lines through both.

Room audit/. Standard library only. Layers of a stage are alike, and micro-batches of a step: what a step has of
products, parameters and collectives' bytes is a + b L + c M + d L M of L layers and M micro-batches. Not of that kind:
how many transfers a sharded optimizer's buckets make (their bytes are), and memory, which is read where the pipeline is
full and gradients add up (at three micro-batches their sum lies beside a term), and taken along L only: the first stage
has most with two micro-batches more than there are stages.
Proof: tests/audit/test_points.py, and against whole steps docs/results/audit.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

__all__ = ["Point", "Points", "points"]

Point = tuple[int, int]
"""Layers of a stage's chunk, micro-batches of a step."""


@dataclass(frozen=True)
class Points:
    """What is lowered, and what is wanted: layers and micro-batches, ascending, one or two of each."""

    layers: tuple[int, ...]
    micro: tuple[int, ...]
    wanted: Point

    @property
    def all(self) -> tuple[Point, ...]:
        """The smallest first, the largest last."""
        return tuple(product(self.layers, self.micro))

    def value(self, of: Callable[[Point], float]) -> float:
        """A step's figure, from those of the lowered ones."""
        return _line(self.layers, [_line(self.micro, [of((a, b)) for b in self.micro], self.wanted[1])
                                   for a in self.layers], self.wanted[0])  # fmt: skip

    def at_full_pipeline(self, of: Callable[[Point], float]) -> float:
        """As value, of a figure that further micro-batches do not change."""
        return _line(self.layers, [of((a, self.micro[-1])) for a in self.layers], self.wanted[0])


def _line(places: tuple[int, ...], values: list[float], wanted: int) -> float:
    if len(places) == 1:
        return values[0] * wanted / places[0] if wanted != places[0] else values[0]
    slope = (values[1] - values[0]) / (places[1] - places[0])
    return values[0] + slope * (wanted - places[0])


def points(model: Mapping[str, Any], micro_batches: int, *, whole: bool = False) -> Points:
    """What to lower of a model.

    model   NeMo's section; whole: nothing less than all of it
    """
    stages = int(model.get("pipeline_model_parallel_size") or 1)
    chunks = int(model.get("virtual_pipeline_model_parallel_size") or 1)
    layers, rest = divmod(int(model["num_layers"]), stages * chunks)
    few = () if whole or rest or not _alike(model) else FEW
    least = stages if chunks > 1 else 1
    most = 2 * stages if chunks > 1 else stages + 2
    return Points(
        few if few and few[-1] < layers else (layers,),
        (least, most) if not whole and micro_batches > most else (micro_batches,),
        (layers, micro_batches),
    )


FEW = (1, 2)

UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
    "pipeline_cuts",
    "encoder_num_layers",
)
"""Keys by which layers or stages are not alike."""


def _alike(model: Mapping[str, Any]) -> bool:
    recomputed = model.get("activations_checkpoint_method") != "block"
    recomputed &= model.get("activations_checkpoint_num_layers") in (None, 1)
    return recomputed and model.get("moe_layer_freq") in (None, 1) and not any(model.get(key) for key in UNEVEN)
