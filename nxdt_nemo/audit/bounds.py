"""What a step cannot be faster than on an instance: compute, device memory, links.

Room audit/. Figures of instances: nxdt_nemo.config.instances. Proof: tests/audit/test_formula.py.

Each bound is a quantity of the lowered step over a published peak, as if nothing else took time: a rank's products over
its share of the tensor engines, their operands over its share of HBM's bandwidth, what collectives bring onto its chip
over the chip's links, onto its instance over the network. The largest is a floor for the step's time, and the share of
the peak that is left for the model's FLOPs (without recomputation) a ceiling for MFU. Real steps are slower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from nxdt_nemo.audit.hlo import Collective
from nxdt_nemo.config.instances import Dtype, Instance

__all__ = ["Bounds", "arriving", "bounds"]


@dataclass(frozen=True)
class Bounds:
    """Seconds of a step, by what it waits for; mfu is a share of 1, None where the model's FLOPs are not known."""

    compute: float
    memory: float
    neuronlink: float
    network: float
    mfu: float | None

    @property
    def step(self) -> float:
        """The floor."""
        return max(self.compute, self.memory, self.neuronlink, self.network)

    @property
    def by(self) -> str:
        """Which of them it is."""
        return max(("compute", "memory", "neuronlink", "network"), key=lambda name: getattr(self, name))


def bounds(
    instance: Instance,
    lnc: int | None,
    *,
    dtype: Dtype,
    flops: float,
    model_flops: float | None,
    bytes_moved: float,
    collectives: Iterable[tuple[Collective, float]],
    rank: int,
) -> Bounds:
    """The bounds of one rank's step.

    dtype         that products are made in
    flops         of the step's products, recomputation included
    model_flops   without it; None where nobody can tell
    bytes_moved   that the products read and write
    collectives   each with how often the step has it
    """
    core, chip = instance.core(lnc), instance.cores(lnc) // instance.chips
    linked = instance.cores(lnc) * instance.linked
    inside = outside = 0.0
    for one, times in collectives:
        if from_afar := arriving(one, linked, rank):
            outside += from_afar * times
        else:
            inside += arriving(one, chip, rank) * times
    peak = core.flops[dtype]
    seconds = (
        flops / peak,
        bytes_moved / core.hbm_bandwidth,
        inside / instance.neuronlink if instance.neuronlink else 0.0,
        outside / (instance.network * instance.linked),
    )
    return Bounds(*seconds, mfu=None if model_flops is None else model_flops / (peak * max(seconds)))


def arriving(one: Collective, size: int, rank: int) -> float:
    """Bytes that have to come to a rank's place from others: once for all of its ranks, in each of their groups.

    size  ranks of a place (a chip, an instance), which are consecutive
    n (1 - 1/p) of n bytes among p places, an all-reduce twice that; an all-to-all brings each rank its own.
    """
    here = rank // size
    if one.kind == "collective-permute":
        pairs = ((source // size, target // size) for source, target in one.groups)
        return float(one.whole * sum(source != target == here for source, target in pairs))
    each_rank, once = _shares(one.groups, size, here)
    return one.whole * (each_rank if one.kind == "all-to-all" else once * (2 if one.kind == "all-reduce" else 1))


@lru_cache(maxsize=1024)
def _shares(groups: tuple[tuple[int, ...], ...], size: int, here: int) -> tuple[float, float]:
    """Of a group's tensor, added up over the groups that have ranks here: what comes from elsewhere to each of these
    ranks if each has a tensor of its own, and what comes if all need the same one."""
    each_rank = once = 0.0
    for group in groups:
        places = [member // size for member in group]
        if own := places.count(here):
            each_rank += own * (1 - own / len(group))
            once += 1 - 1 / len(set(places))
    return each_rank, once
