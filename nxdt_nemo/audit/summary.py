"""A job read before it is paid for: the step of chosen ranks of a world, lowered, added up and compared.

Room audit/. Micro-batches of a step are alike: two steps of few of them are lowered and the rest is added in line, which
the report says. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdt_nemo.audit.bounds import Bounds, bounds
from nxdt_nemo.audit.deadlock import mismatches
from nxdt_nemo.audit.formula import Count, Decoder, count
from nxdt_nemo.audit.hlo import Collective, Graph
from nxdt_nemo.audit.lowering import Lowered, lower
from nxdt_nemo.config.instances import Dtype, Instance
from nxdt_nemo.errors import ConfigError

__all__ = ["Audit", "Rank", "audit", "chosen"]


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

    graphs          distinct graphs until the step repeats; executions of one step
    flops           of a micro-batch, recomputation included; analytic: the same by hand
    least_bytes     of whole tensors that a step's collectives cannot do without, None without a formula (docs/communication.md)
    peak_bytes      live at once in the lowered step, program order
    state_bytes     what lives from step to step: weights, gradients' and optimizer's memory
    program         digest of the step: equal for ranks that run one program
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
    """What was found. `mismatch` is the first place where ranks part, "" where they agree."""

    world: int
    micro_batches: int
    lowered_micro_batches: tuple[int, ...]
    target: str
    hbm: int
    ranks: tuple[Rank, ...]
    mismatch: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain values, by the names of docs/audit.md."""
        first = self.ranks[0]
        return {
            "world": self.world,
            "target": self.target,
            "micro_batches": self.micro_batches,
            "lowered_micro_batches": list(self.lowered_micro_batches),
            "graphs": max(rank.graphs for rank in self.ranks),
            "parameters": first.parameters,
            "flops": first.flops,
            "collectives": [dataclasses.asdict(one) for one in first.transfers],
            "peak_bytes": max(rank.peak_bytes for rank in self.ranks),
            "hbm_bytes": self.hbm,
            "mfu_bound": min((rank.bounds.mfu for rank in self.ranks if rank.bounds), default=None),
            "host_transfers": dict(sum((Counter(rank.host_transfers) for rank in self.ranks), Counter())),
            "fallbacks": dict(sum((Counter(rank.fallbacks) for rank in self.ranks), Counter())),
            "mismatch": self.mismatch or None,
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
    keep: Callable[[int, Graph], None] | None = None,
) -> Audit:
    """Lower the step of `ranks` (see chosen) of a world, and read it.

    config   a NeMo configuration, resolved
    keep     called with each rank's step of most micro-batches
    Raises UserError for what a run would refuse.
    """
    import time

    from omegaconf import OmegaConf

    began = time.monotonic()
    model = config.model
    stages = int(model.get("pipeline_model_parallel_size") or 1)
    width = int(model.get("tensor_model_parallel_size") or 1) * stages * int(model.get("context_parallel_size") or 1)
    if world % width:
        raise ConfigError(f"a world of {world} cannot be cut into {width} ranks of one replica", place="--world")
    micro, whole = int(model.micro_batch_size), int(model.global_batch_size)
    replicas = world // width
    count_of, rest = divmod(whole, micro * replicas)
    if rest:
        reason = f"global_batch_size={whole} is no multiple of micro_batch_size={micro} x {replicas} replicas"
        raise ConfigError(reason, place="model.global_batch_size")
    counts = _lowered_counts(count_of, stages, int(model.get("virtual_pipeline_model_parallel_size") or 1))
    found: dict[int, list[Lowered]] = {}
    for rank in ranks or chosen(world, stages):
        for number in counts:
            short = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
            short.model.global_batch_size = number * micro * replicas
            short.trainer.num_nodes = max(1, world // int(short.trainer.devices))
            found.setdefault(rank, []).append(lower(short, rank, world))
            if number == counts[-1] and keep is not None:
                keep(rank, found[rank][-1].graphs[found[rank][-1].step[-1]])
    steps = {rank: [one for graph in lowered[-1].step for one in lowered[-1].graphs[graph].collectives]
             for rank, lowered in found.items()}  # fmt: skip
    return Audit(
        world,
        count_of,
        counts,
        target.name if target else "",
        target.core(config.trainer.get("lnc")).hbm if target else 0,
        tuple(_rank(config, lowered, counts, count_of, target) for lowered in found.values()),
        next((str(one) for one in mismatches(steps)), ""),
        time.monotonic() - began,
    )


def _lowered_counts(count_of: int, stages: int, chunks: int) -> tuple[int, ...]:
    """Micro-batches of the steps that are lowered: the pipeline is full in both, so that one more is a line's step."""
    least = stages if stages > 1 else 1
    more = stages if chunks > 1 else 1
    counts = (least, least + more)
    return counts if count_of > counts[-1] else (count_of,)


def _rank(config: Any, lowered: Sequence[Lowered], counts: Sequence[int], count_of: int, target: Instance | None) -> Rank:
    last = lowered[-1]
    graphs = [last.graphs[index] for index in last.step]
    sizes = [sum(one.graphs[index].flops for index in one.step) for one in lowered]
    flops_step = _line(sizes, counts, count_of)
    moved = _line([sum(one.graphs[index].product_bytes for index in one.step) for one in lowered], counts, count_of)
    times = _times(lowered, counts, count_of)
    analytic = _analytic(config, last)
    model = analytic.model * count_of if analytic else flops_step
    dtype: Dtype = "bfloat16" if any(graph.dtypes.get("bf16", 0) for graph in graphs) else "float32"
    found = None
    if target is not None:
        found = bounds(
            target,
            config.trainer.get("lnc"),
            dtype=dtype,
            flops=flops_step,
            model_flops=model,
            bytes_moved=moved,
            collectives=times,
            rank=last.rank,
        )
    dtypes: Counter[str] = sum((graph.dtypes for graph in graphs), Counter())
    return Rank(
        last.rank,
        last.stage,
        len(last.graphs),
        len(last.step),
        sum(len(graph.operations) for graph in graphs),
        last.parameters,
        flops_step / count_of,
        analytic,
        _transfers(times, last.rank),
        _least(config, last, count_of),
        max(graph.peak_bytes() for graph in graphs),
        max(sum(shape.bytes for shape in graph.parameters()) for graph in graphs),
        found,
        last.reads,
        last.fallbacks,
        dict(dtypes),
        graphs[-1].digest,
    )


def _line(values: Sequence[float], counts: Sequence[int], wanted: int) -> float:
    if len(values) == 1:
        return values[0] * wanted / counts[0]
    slope = (values[1] - values[0]) / (counts[1] - counts[0])
    return values[0] + slope * (wanted - counts[0])


def _times(lowered: Sequence[Lowered], counts: Sequence[int], wanted: int) -> list[tuple[Collective, float]]:
    """Each distinct collective, and how often a whole step has it."""
    seen = [Counter(one for index in each.step for one in each.graphs[index].collectives) for each in lowered]
    distinct = {one: None for counter in seen for one in counter}
    return [(one, _line([counter[one] for counter in seen], counts, wanted)) for one in distinct]


def _transfers(times: Sequence[tuple[Collective, float]], rank: int) -> tuple[Transfer, ...]:
    sums: dict[tuple[str, str, tuple[int, ...]], list[float]] = {}
    for one, number in times:
        entry = sums.setdefault((one.kind, one.dtype, one.group_of(rank)), [0.0, 0.0, 0.0])
        for place, value in enumerate((number, one.whole * number, one.received * number)):
            entry[place] += value
    rows = [Transfer(kind, dtype, group, *values) for (kind, dtype, group), values in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.received))


def _plain_decoder(model: Any, stages: int) -> bool:
    """No context parallelism, no experts, even stages: what the formulas here are asked for."""
    apart = int(model.get("context_parallel_size") or 1) > 1 or bool(model.get("num_moe_experts"))
    return not apart and int(model.num_layers) % stages == 0


def _least(config: Any, lowered: Lowered, count_of: int) -> float | None:
    """Bytes of whole tensors that a step of this rank has to send."""
    from nxdt_nemo.megatron.communication import Model, Step, sent, stages_of

    model = config.model
    stage, stages = lowered.stage
    if not _plain_decoder(model, stages):
        return None
    tp, heads = int(model.get("tensor_model_parallel_size") or 1), int(model.num_attention_heads)
    groups, gated = int(model.get("num_query_groups") or heads), "glu" in str(model.get("activation", "gelu"))
    learned = model.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    half = "bf16" in str(config.trainer.precision)
    decoder = Model(
        layers=int(model.num_layers),
        hidden=int(model.hidden_size),
        heads=heads,
        kv_groups=groups,
        head=int(model.get("kv_channels") or model.hidden_size // heads),
        ffn=int(model.ffn_hidden_size),
        vocab=lowered.vocab * tp,
        gated=gated,
        biases=bool(model.get("bias", True)),
        norm=1 if "rms" in str(model.get("normalization", "layernorm")) else 2,
        learned=int(model.max_position_embeddings) if learned else 0,
        tied=bool(model.get("share_embeddings_and_output_weights", True)),
        width=2 if half else 4,
    )
    step = Step(
        seq=int(model.encoder_seq_length),
        micro_batch=int(model.micro_batch_size),
        micro_batches=count_of,
        stages=stages_of(decoder.layers, stages),
        tp=tp,
        dp=lowered.world // (tp * stages),
        sp=bool(model.get("sequence_parallel")),
        zero=str(model.optim.name) in ("distributed_fused_adam", "mcore_distributed_optim"),
        recompute=str(model.get("activations_checkpoint_granularity") or "") == "full",
    )
    return float(sum(term.least for term in sent(decoder, step, stage)))


def _analytic(config: Any, lowered: Lowered) -> Count | None:
    """By hand, for what the formula covers."""
    model = config.model
    if not _plain_decoder(model, lowered.stage[1]):
        return None
    stage, stages = lowered.stage
    tp = int(model.get("tensor_model_parallel_size") or 1)
    heads = int(model.num_attention_heads)
    groups = int(model.get("num_query_groups") or heads)
    layers, seq = int(model.num_layers) // stages, int(model.encoder_seq_length)
    asked = str(model.get("activations_checkpoint_granularity") or "")
    some = int(model.get("activations_checkpoint_num_layers") or layers)
    every = asked == "selective" or model.get("activations_checkpoint_method") == "uniform"
    from nxdt_nemo.megatron.transformer.attention_choice import LONG
    from nxdt_nemo.megatron.transformer.blocked_attention import BLOCK

    part = Decoder(
        layers=layers,
        hidden=int(model.hidden_size),
        seq=seq,
        batch=int(model.micro_batch_size),
        queries=heads // tp,
        groups=max(groups // tp, 1),
        features=int(model.get("kv_channels") or model.hidden_size // heads),
        ffn=int(model.ffn_hidden_size) // tp,
        gated="glu" in str(model.get("activation", "gelu")),
        vocab=lowered.vocab,
        head=stage == stages - 1,
        block=BLOCK if seq >= LONG else 0,
        recompute="full" if asked == "full" else "selective" if asked == "selective" else "",
        recomputed_layers=(layers if every else min(some, layers)) if asked else 0,
    )
    return count(part)
