"""A job read before it is paid for: the step of chosen ranks of a world, lowered, added up and compared.

Room audit/. Of a large model small steps are lowered and the figures are of lines through them (points.py), which the
report says. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdt_nemo.audit.bounds import Bounds, bounds
from nxdt_nemo.audit.by_hand import hardware_flops, model_flops, sent_bytes
from nxdt_nemo.audit.deadlock import compared, mismatches
from nxdt_nemo.audit.formula import FORMULA, Count
from nxdt_nemo.audit.hlo import Collective, Graph
from nxdt_nemo.audit.lowering import STEPS, Lowered, lower
from nxdt_nemo.audit.points import Point, Points, points
from nxdt_nemo.audit.schedule import peak_bytes
from nxdt_nemo.config.instances import Dtype, Instance
from nxdt_nemo.config.job import job_of
from nxdt_nemo.config.neuron import neuron_section
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError

__all__ = ["ROOM", "Audit", "Rank", "audit", "chosen"]

ROOM = 0.8
"""The part of a rank's memory that live bytes may take for it to hold the step: buffers are packed with gaps, and the
compiler has some of its own (docs/audit.md)."""


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind and group in a step of one rank. whole and received: bytes, all of them together."""

    kind: str
    dtype: str
    ranks: tuple[int, ...]
    times: float
    whole: float
    received: float


@dataclass(frozen=True)
class Rank:
    """One rank's step.

    graphs          that are compiled until the step repeats; executions of one step
    operations      of the largest step that was lowered
    flops           of a micro-batch, recomputation included; analytic: the same by hand
    least_bytes     of whole tensors that a step's collectives cannot do without (docs/communication.md), None without
                    a formula; expected_bytes: with what is known to be sent beyond that
    peak_bytes      live at once, in an order that keeps few alive (schedule.py)
    state_bytes     that the step is given: weights, gradients' and optimizer's memory, the batch
    program         digest of the largest step that was lowered, all its graphs: equal for ranks that run one program
    """

    rank: int
    stage: tuple[int, int]
    graphs: int
    executions: int
    operations: int
    parameters: int
    flops: float
    analytic: Count | None
    transfers: tuple[Transfer, ...]
    least_bytes: float | None
    expected_bytes: float | None
    peak_bytes: int
    state_bytes: int
    bounds: Bounds | None
    host_transfers: Mapping[str, int]
    fallbacks: Mapping[str, int]
    dtypes: Mapping[str, int]
    program: str

    @property
    def sent_bytes(self) -> float:
        """Of whole tensors, in a step's collectives."""
        return sum(one.whole for one in self.transfers)


@dataclass(frozen=True)
class Audit:
    """What was found. `mismatch` is the first place where ranks part, "" where they agree.

    points     what was lowered, and what the figures are of
    compared   pairs of lowered ranks that are both in some collective
    """

    world: int
    points: Points
    target: str
    hbm: int
    ranks: tuple[Rank, ...]
    mismatch: str
    compared: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Live at once, on the rank that has most."""
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def fits(self) -> bool | None:
        """Do live bytes leave the target the room that they need? None without a target."""
        return self.peak_bytes <= ROOM * self.hbm if self.hbm else None

    @property
    def formula(self) -> str:
        """What FLOPs were counted by hand by, for their hardware's or their model's part; "" without either."""
        known = any(rank.analytic or (rank.bounds and rank.bounds.mfu is not None) for rank in self.ranks)
        return FORMULA if known else ""

    @property
    def runs(self) -> bool:
        """Would the job run as it stands: ranks agree, nothing leaves the graph, memory holds what is live?"""
        apart = any(rank.host_transfers or rank.fallbacks for rank in self.ranks)
        return not (self.mismatch or apart or (self.hbm and self.peak_bytes > self.hbm))

    def as_json(self) -> dict[str, Any]:
        """Plain values, by the names of docs/audit.md."""
        first = self.ranks[0]
        return {
            "world": self.world,
            "target": self.target,
            "layers_of_a_stage": self.points.wanted[0],
            "micro_batches": self.points.wanted[1],
            "lowered_layers": list(self.points.layers),
            "lowered_micro_batches": list(self.points.micro),
            "graphs": max(rank.graphs for rank in self.ranks),
            "parameters": first.parameters,
            "flops": first.flops,
            "formula": self.formula,
            "dtypes": dict(first.dtypes),
            "collectives": [dataclasses.asdict(one) for one in first.transfers],
            "peak_bytes": self.peak_bytes,
            "hbm_bytes": self.hbm,
            "fits": self.fits,
            "mfu_bound": min(
                (one.bounds.mfu for one in self.ranks if one.bounds and one.bounds.mfu is not None), default=None
            ),
            "host_transfers": dict(sum((Counter(rank.host_transfers) for rank in self.ranks), Counter())),
            "fallbacks": dict(sum((Counter(rank.fallbacks) for rank in self.ranks), Counter())),
            "mismatch": self.mismatch or None,
            "compared": self.compared,
            "seconds": self.seconds,
            "ranks": [_plain(rank) for rank in self.ranks],
        }


def _plain(rank: Rank) -> dict[str, Any]:
    found = dataclasses.asdict(rank)
    found["sent_bytes"] = rank.sent_bytes
    if rank.bounds:
        found["bounds"] |= {"step": rank.bounds.step, "by": rank.bounds.by}
    return found


def chosen(world: int, stages: int) -> list[int]:
    """Of each pipeline stage one rank; of the first also its last, which shows that a stage runs one program."""
    each = world // stages
    return sorted({*(stage * each for stage in range(stages)), each - 1})


def audit(
    config: Any,
    world: int,
    *,
    ranks: Sequence[int] | None = None,
    target: Instance | None = None,
    keep: Callable[[int, Sequence[Graph]], None] | None = None,
    whole: bool = False,
    elsewhere: Mapping[int, Any] | None = None,
) -> Audit:
    """Lower the step of `ranks` (see chosen) of a world, and read it.

    config      a NeMo configuration, resolved
    keep        called with each rank's largest lowered step, graph by graph
    whole       lower all layers and micro-batches
    elsewhere   ranks that were started with another configuration, and that; they are lowered too
    Raises UserError for what a run would refuse.
    """
    began = time.monotonic()
    elsewhere = elsewhere or {}
    ranks = chosen(world, int(config.model.get("pipeline_model_parallel_size") or 1)) if ranks is None else ranks
    for named, option in ((ranks, "--rank, --ranks"), (elsewhere, "--except")):
        if outside := [rank for rank in named if not 0 <= rank < world]:
            raise ConfigError(f"rank {outside[0]} is not in a world of {world}", place=option)
    base = _Job.of(config, world, whole=whole)
    others = {rank: _Job.of(one, world, whole=whole) for rank, one in elsewhere.items()}
    sizes = next((_sizes(rank, job, base) for rank, job in others.items() if job.wanted != base.wanted), "")
    if not sizes and any(job.points != base.points for job in others.values()):
        base = _Job.of(config, world, whole=True)  # small steps are compared with small steps of the same size only
        others = {rank: _Job.of(one, world, whole=True) for rank, one in elsewhere.items()}
    jobs = {rank: others.get(rank, base) for rank in dict.fromkeys([*ranks, *others])}
    lnc = job_of(View(config), neuron_section(config), on=target).cores_a_rank if target else None
    found: dict[int, dict[Point, Lowered]] = {}
    for rank, job in jobs.items():
        found[rank] = job.lowered(rank)
        if keep is not None:
            keep(rank, found[rank][job.points.all[-1]].step)
    largest = {rank: found[rank][job.points.all[-1]] for rank, job in jobs.items()}
    steps_of = {rank: [one for graph in last.step for one in graph.collectives] for rank, last in largest.items()}
    stages = {rank: last.stage[0] for rank, last in largest.items()}
    parting = next((str(one) for one in mismatches(steps_of, stages)), "")
    return Audit(
        world,
        base.points,
        target.name if target else "",
        target.core(lnc).hbm if target else 0,
        tuple(_rank(jobs[rank].config, lowered, jobs[rank].points, target, lnc) for rank, lowered in found.items()),
        "; ".join(filter(None, (sizes, parting))),
        compared(steps_of),
        time.monotonic() - began,
    )


@dataclass(frozen=True)
class _Job:
    """What a rank was started with.

    points     what to lower of it
    one_each   the global batch of one micro-batch
    """

    config: Any
    world: int
    points: Points
    one_each: int

    @classmethod
    def of(cls, config: Any, world: int, *, whole: bool) -> _Job:
        """Raises ConfigError for a world or a batch that cannot be divided."""
        from nxdt_nemo.config.rules import apply, check

        config = _copy(config)
        apply(config, check(config, world_size=world).changes)  # as a run's hydra_runner does
        model = config.model
        parts = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        width = math.prod(int(model.get(part) or 1) for part in parts)
        if world % width:
            raise ConfigError(f"a world of {world} cannot be cut into {width} ranks of one replica", place="--world")
        micro, whole_batch, replicas = int(model.micro_batch_size), int(model.global_batch_size), world // width
        count_of, rest = divmod(whole_batch, micro * replicas)
        if rest or not count_of:
            reason = f"global_batch_size={whole_batch} is no multiple of micro_batch_size={micro} x {replicas} replicas"
            raise ConfigError(reason, place="model.global_batch_size")
        return cls(config, world, points(model, count_of, whole=whole), micro * replicas)

    @property
    def wanted(self) -> Point:
        return self.points.wanted

    def lowered(self, rank: int) -> dict[Point, Lowered]:
        """The steps of a rank. Three steps of the smallest: does the third have the graph of the second?"""
        return {
            point: lower(self._resized(point), rank, self.world, STEPS if place else STEPS + 1)
            for place, point in enumerate(self.points.all)
        }

    def _resized(self, point: Point) -> Any:
        """The config of a smaller step."""
        short = _copy(self.config)
        stages = int(short.model.get("pipeline_model_parallel_size") or 1)
        chunks = int(short.model.get("virtual_pipeline_model_parallel_size") or 1)
        if int(short.model.num_layers) % (stages * chunks) == 0:
            short.model.num_layers = point[0] * stages * chunks
        short.model.global_batch_size = point[1] * self.one_each
        short.trainer.num_nodes = max(1, self.world // int(short.trainer.devices))
        return short


def _copy(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(OmegaConf.to_container(config, resolve=True))


def _sizes(rank: int, job: _Job, base: _Job) -> str:
    """What small steps, which have as many layers and micro-batches on all ranks, would not show."""
    own, common = (f"{layers} layers and {micro} micro-batches" for layers, micro in (job.wanted, base.wanted))
    return f"of a stage and chunk, and in a step, rank {rank} has {own}, the others have {common}"


def _rank(
    config: Any, lowered: Mapping[Point, Lowered], wanted: Points, target: Instance | None, lnc: int | None
) -> Rank:
    first, last = lowered[wanted.all[0]], lowered[wanted.all[-1]]
    count_of = wanted.wanted[1]

    def summed(figure: Callable[[Graph], float]) -> Callable[[Point], float]:
        return lambda point: sum(figure(graph) for graph in lowered[point].step)

    flops_step = wanted.value(summed(lambda graph: graph.flops))
    moved = wanted.value(summed(lambda graph: graph.product_bytes))
    times = _times(lowered, wanted)
    analytic, needed = hardware_flops(config, last), model_flops(config, last)
    given = wanted.value(lambda point: max(map(_given, lowered[point].step)))
    dtype: Dtype = "bfloat16" if any(graph.dtypes.get("bf16", 0) for graph in last.step) else "float32"
    found = None
    if target is not None:
        found = bounds(
            target,
            lnc,
            dtype=dtype,
            flops=flops_step,
            model_flops=None if needed is None else needed * count_of,
            bytes_moved=moved,
            collectives=times,
            rank=last.rank,
        )
    return Rank(
        last.rank,
        last.stage,
        first.distinct,
        len(last.step),
        sum(len(graph.operations) for graph in last.step),
        round(wanted.at_full_pipeline(lambda point: lowered[point].parameters)),
        flops_step / count_of,
        analytic,
        _transfers(times, last.rank),
        *sent_bytes(config, last, count_of),
        round(wanted.at_full_pipeline(lambda point: max(map(_live, lowered[point].step))) + given),
        round(given),
        found,
        last.reads,
        last.fallbacks,
        dict(sum((graph.dtypes for graph in last.step), Counter())),
        _program(last.step),
    )


def _program(step: Sequence[Graph]) -> str:
    """A digest of all graphs of a step."""
    digests = [graph.digest for graph in step]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _given(graph: Graph) -> int:
    return sum(shape.bytes for shape in graph.parameters())


def _live(graph: Graph) -> int:
    """At once, beside what it is given."""
    return peak_bytes(graph.operations) - _given(graph)


def _times(lowered: Mapping[Point, Lowered], wanted: Points) -> list[tuple[Collective, float]]:
    """Each distinct collective, and how often a whole step has it. Buckets of the small steps, which the large one does
    not have, come out less than never: only sums over a group mean something."""
    seen = {point: Counter(one for graph in each.step for one in graph.collectives) for point, each in lowered.items()}
    distinct = {one: None for counter in seen.values() for one in counter}
    return [(one, wanted.value(lambda point, one=one: seen[point][one])) for one in distinct]  # type: ignore[misc]


def _transfers(times: Sequence[tuple[Collective, float]], rank: int) -> tuple[Transfer, ...]:
    sums: dict[tuple[str, str, tuple[int, ...]], list[float]] = {}
    for one, number in times:
        entry = sums.setdefault((one.kind, one.dtype, one.group_of(rank)), [0.0, 0.0, 0.0])
        for place, value in enumerate((number, one.whole * number, one.received * number)):
            entry[place] += value
    rows = [Transfer(kind, dtype, group, *values) for (kind, dtype, group), values in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.received))
