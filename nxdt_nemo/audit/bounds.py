"""What a step cannot be faster than on an instance: compute, device memory, links.

Room audit/. Figures of instances: nxdt_nemo.config.instances. Proof: tests/audit/test_formula.py.

Each bound is a quantity of the lowered step over a published peak of one rank's share of the chip, as if nothing else
took time: products over the tensor engine's FLOP/s, their operands over HBM's bandwidth, what collectives receive
over the links. The largest is a floor for the step's time, and the share of the peak that is left for the model's
FLOPs (without recomputation) a ceiling for MFU. Real steps are slower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nxdt_nemo.audit.hlo import Collective
from nxdt_nemo.config.instances import Dtype, Instance

__all__ = ["Bounds", "bounds"]


@dataclass(frozen=True)
class Bounds:
    """Seconds of a step, by what it waits for; mfu is a share of 1."""

    compute: float
    memory: float
    neuronlink: float
    network: float
    mfu: float

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
    model_flops: float,
    bytes_moved: float,
    collectives: Iterable[tuple[Collective, float]],
    rank: int,
) -> Bounds:
    """The bounds of one rank's step.

    dtype         that products are made in
    flops         of the step's products, recomputation included
    model_flops   without it
    bytes_moved   that the products read and write
    collectives   each with how often the step has it
    """
    core, cores = instance.core(lnc), instance.cores(lnc)
    inside = outside = 0.0
    for one, times in collectives:
        nodes = {member // cores for member in one.group_of(rank)}
        if len(nodes) > 1:
            outside += one.received * times
        elif nodes:
            inside += one.received * times
    peak = core.flops[dtype]
    seconds = (
        flops / peak,
        bytes_moved / core.hbm_bandwidth,
        inside / core.neuronlink if core.neuronlink else 0.0,
        outside / core.network if core.network else 0.0,
    )
    return Bounds(*seconds, mfu=model_flops / (peak * max(seconds)) if max(seconds) else 0.0)
