"""What a training step keeps in memory on one rank, by arithmetic alone.

Room megatron/. Beside Megatron-LM's megatron/training/theoretical_memory_usage.py, whose numbers are for bf16, fused
attention, sequence parallelism and selective recomputation; ours are derived from the operations that this backend
runs, for its dtypes, each kind of recomputation and both attentions. Imports no torch: a job is sized where none of it
is installed. Derivation: docs/memory.md. Proof: tests/testing/test_memory.py, tools/memory.py (within 10 %).
Paper: Korthikanti et al. 2022, arXiv:2205.05198.

    found = estimate(Job(layers=32, hidden=4096, ffn=11008, heads=32, vocab=32000, seq=4096, ...), stage=0)
    found.fixed, found.kept, found.peak     # bytes: between steps, of activations, of a step
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["Attention", "Estimate", "Job", "Kept", "Recompute", "estimate", "head", "layer", "parameters"]

Recompute = Literal["none", "selective", "full"]
Attention = Literal["sdpa", "blocked", "scores"]
FLOAT = 4  # bytes of float32
INDEX = 8  # of int64


@dataclass(frozen=True)
class Job:
    """A decoder-only transformer, how its ranks are laid out, and what a step does. Sizes in tokens and features, and
    such that each division comes out even; 1F1B, no experts.

    groups, head_size   0: as many as heads; hidden / heads
    gated               SwiGLU in place of GELU: the first product of an MLP is twice as wide
    rms_norm, bias      RMSNorm in place of LayerNorm; biases of linear layers
    tied, rope          the output layer's weight is the embedding's; rotary (fused) in place of learned positions
    dtype               of weights and activations. bfloat16 means float32 main parameters beside them; gradients are
                        added up in float32 either way
    micro_batches       of a data-parallel rank in a step
    tp, cp, pp, dp      sizes; sp: sequence parallelism; zero: the optimizer's state is cut over dp * cp ranks
    recompute           of activations: full is each layer from its input, selective is core attention
    hidden_dropout, attention_dropout   whether they drop anything
    attention           what computes it: "scores" is the code that makes them whole (docs/attention.md: upstream)
    frees_outputs       deallocate_pipeline_outputs
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    seq: int
    micro_batch: int = 1
    micro_batches: int = 1
    groups: int = 0
    head_size: int = 0
    gated: bool = False
    rms_norm: bool = False
    bias: bool = True
    tied: bool = True
    rope: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    dp: int = 1
    zero: bool = False
    recompute: Recompute = "none"
    hidden_dropout: bool = False
    attention_dropout: bool = False
    attention: Attention = "sdpa"
    frees_outputs: bool = False

    @property
    def item(self) -> int:
        """Bytes of an element of an activation or a weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def width(self) -> int:
        """Features of a head."""
        return self.head_size or self.hidden // self.heads

    @property
    def query(self) -> int:
        """Features of a rank's queries, all heads."""
        return self.heads // self.tp * self.width

    @property
    def key(self) -> int:
        """Features of a rank's keys, or values; where there are fewer groups than ranks each has a copy of one."""
        return max((self.groups or self.heads) // self.tp, 1) * self.width

    @property
    def tokens(self) -> int:
        """Of a rank, where each tensor-parallel rank has all of them."""
        return self.seq // self.cp * self.micro_batch

    @property
    def own_tokens(self) -> int:
        """Of a rank, where sequence parallelism has cut them."""
        return self.tokens // self.tp if self.sp else self.tokens

    @property
    def stream(self) -> int:
        """Bytes of the residual stream [S, B, H] on a rank."""
        return self.own_tokens * self.hidden * self.item

    @property
    def whole(self) -> int:
        """Bytes of the residual stream of all of a rank's tokens."""
        return self.tokens * self.hidden * self.item

    @property
    def up(self) -> int:
        """Features that an MLP's first product gives on a rank."""
        return self.ffn * (2 if self.gated else 1) // self.tp

    @property
    def scores(self) -> int:
        """Bytes of the scores [B, N, S, T] on a rank."""
        return self.heads // self.tp * self.tokens * (self.seq // self.cp) * self.item


class Kept(NamedTuple):
    """What an operation keeps for the backward pass: `op` keeps `tensor`, that many bytes."""

    op: str
    tensor: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank.

    weights, gradients, optimizer   as between two steps; optimizer: moments, and main parameters beside bf16 weights
    buffers     megatron-core's own, which the first step makes: of gathered inputs or of scores; and the last input
                of a pipeline's stage with its gradient, which the module keeps
    saved       what autograd keeps of one micro-batch, by operation
    in_flight   micro-batches whose backward pass is still to come, at most (1F1B)
    outputs     outputs of this stage that the pipeline's schedule holds
    named       a stage's output and its gradient, done with, that the schedule's loop still names in a forward pass
    working     what a moment needs beyond `kept`, by moment; the largest counts
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    saved: tuple[Kept, ...]
    in_flight: int
    outputs: int
    named: int
    working: dict[str, int] = field(default_factory=dict)

    @property
    def fixed(self) -> int:
        """Whatever the step is at."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def saved_bytes(self) -> int:
        """Of one micro-batch."""
        return sum(kept.bytes for kept in self.saved)

    @property
    def kept(self) -> int:
        """Activations at the end of a forward pass, when all micro-batches are in flight."""
        return self.in_flight * self.saved_bytes + self.outputs + self.named

    @property
    def activations(self) -> int:
        """The most that a step needs beyond `fixed`."""
        return self.in_flight * self.saved_bytes + self.outputs + max(self.working.values())

    @property
    def peak(self) -> int:
        """The most that there is during a step."""
        return self.fixed + self.activations


def estimate(job: Job, stage: int = 0) -> Estimate:
    """Of a rank in a pipeline's stage `stage`. Every tensor-parallel and data-parallel rank of a stage has the same."""
    count = parameters(job, stage)
    state = (2 if job.dtype == "float32" else 3) * FLOAT * count
    in_flight = min(job.micro_batches, job.pp - stage)
    sends, last_input = stage < job.pp - 1, 2 * job.stream if stage > 0 else 0
    shared = max(job.whole if job.sp else 0, job.scores if job.attention == "scores" else 0)
    return Estimate(
        weights=count * job.item,
        gradients=count * FLOAT,
        optimizer=state // (job.dp * job.cp) if job.zero else state,
        buffers=shared + last_input,
        saved=tuple(_saved(job, stage)),
        in_flight=in_flight,
        outputs=in_flight * job.stream if sends and not job.frees_outputs else 0,
        named=2 * job.stream if sends and job.micro_batches > in_flight else 0,
        # gone by then but for the gradient of the input before
        working={moment: size - last_input // 2 for moment, size in _working(job, stage).items()},
    )


def parameters(job: Job, stage: int = 0) -> int:
    """Of a rank in this stage."""
    vectors = job.hidden * (1 if job.rms_norm else 2)
    matrices = job.hidden * (2 * job.query + 2 * job.key + job.up + job.ffn // job.tp)
    biases = job.query + 2 * job.key + job.up + 2 * job.hidden if job.bias else 0
    words = job.vocab // job.tp * job.hidden
    count = job.layers // job.pp * (2 * vectors + matrices + biases)
    first, last = stage == 0, stage == job.pp - 1
    if first:
        count += words + (0 if job.rope else job.seq * job.hidden)
    if last:
        count += vectors + (0 if job.tied and first else words)
    return count


# --- what is kept -------------------------------------------------------------------------------------------------


def layer(job: Job) -> list[Kept]:
    """A layer's, when nothing is recomputed but core attention (job.recompute "selective")."""
    drop = [Kept("dropout", "noise", job.stream)] if job.hidden_dropout else []
    return [
        *_front(job),
        Kept("linear_proj", "its input", job.tokens * job.query * job.item),
        *drop,
        *_norm(job, "MLP norm"),
        Kept("linear_fc1", "its input", job.stream),
        Kept("activation", "its input", job.tokens * job.up * job.item),
        Kept("linear_fc2", "its input", job.tokens * job.ffn // job.tp * job.item),
        *drop,
    ]


def _norm(job: Job, op: str) -> list[Kept]:
    statistics = job.own_tokens * (FLOAT if job.rms_norm else 2 * job.item)
    return [Kept(op, "its input", job.stream), Kept(op, "statistics of a token", statistics)]


def _front(job: Job) -> list[Kept]:
    """A layer's first half up to core attention, whose result the output projection keeps."""
    return [
        *_norm(job, "input norm"),
        Kept("linear_qkv", "its input", job.stream),
        Kept("core attention", "query, key, value", job.tokens * (job.query + 2 * job.key) * job.item),
        *(_probabilities(job) if job.recompute != "selective" else []),
    ]


def _probabilities(job: Job) -> list[Kept]:
    """What core attention keeps beside its inputs."""
    if job.attention != "scores":
        return [Kept("core attention", "log-sum-exp of a row", job.tokens * job.heads // job.tp * FLOAT)]
    times = 3 if job.attention_dropout else 1  # the softmax; noise, and what it leaves
    spread = 2 * job.tokens * (job.query - job.key) * job.item
    return [
        Kept("core attention", "probabilities", times * job.scores),
        Kept("core attention", "keys and values, repeated for each query", spread),
    ]


def head(job: Job) -> list[Kept]:
    """Behind the last layer: the final norm, the output layer and the loss."""
    return [
        *_norm(job, "final norm"),
        Kept("output layer", "its input", job.stream),
        Kept("cross entropy", "exponents, float32", _logits(job) * FLOAT),
        Kept("cross entropy", "a token's sum, index and mask", job.tokens * (FLOAT + INDEX + 1)),
    ]


def _logits(job: Job) -> int:
    return job.tokens * job.vocab // job.tp


def _embedding(job: Job) -> list[Kept]:
    """In front of the first layer."""
    ids = job.tokens * (INDEX + (1 if job.tp > 1 else 0)) + (0 if job.rope else job.seq // job.cp * INDEX)
    noise = [Kept("dropout", "noise", job.stream)] if job.hidden_dropout else []
    return [Kept("embedding", "indices, and a mask", ids), *noise]


def _saved(job: Job, stage: int) -> list[Kept]:
    """One micro-batch's, of one stage."""
    count = job.layers // job.pp
    angles = [Kept("rotary positions", "angles", job.seq // job.cp * job.width * FLOAT)] if job.rope else []
    if job.recompute == "full":
        kept = [Kept("checkpoint", "a layer's input", count * job.stream)]
    else:
        kept = [Kept(op, tensor, count * size) for op, tensor, size in layer(job)]
    first, last = stage == 0, stage == job.pp - 1
    return [*(_embedding(job) if first else []), *angles, *kept, *(head(job) if last else [])]


# --- what a moment needs beside it --------------------------------------------------------------------------------


def _working(job: Job, stage: int) -> dict[str, int]:
    """By moment of the step, beyond what is kept when it begins; less than nothing where it comes later.

    A linear layer's backward pass makes a placeholder of its weight's shape (megatron-core's fused gradients).
    """
    once = _size(_saved(job, stage))
    words = job.vocab // job.tp * job.hidden * job.item
    waiting = words if job.tied and job.pp == 1 else 0  # the output layer's placeholder, until the embedding's comes
    found = {"backward of a layer": _backward(job) + waiting}
    if stage == 0:
        found["backward of the embedding"] = words + waiting - once
    if stage == job.pp - 1:
        given = _logits(job) * job.item
        found["backward of a layer"] -= _size(head(job))
        found["cross entropy"] = given if job.item < FLOAT else 0
        found["backward of the output layer"] = (
            given - _logits(job) * FLOAT + job.tokens * job.hidden * job.item + words
        )
    return found


def _backward(job: Job) -> int:
    """Gradients of one layer, and what of it is made again; the larger of its two halves."""
    wide = job.tokens * job.ffn // job.tp * job.item
    mlp = job.stream + (3 if job.gated else 2) * wide
    again = _size(layer(job)) if job.recompute == "full" else 0
    if job.attention != "scores":
        return again + mlp
    done = _size(layer(job)) - _size(_front(job))  # the MLP's half comes first, and frees what it kept
    attention = job.stream + 3 * job.tokens * job.query * job.item + job.scores * (1 if job.attention_dropout else 2)
    remade = _size(_probabilities(job)) if job.recompute == "selective" else 0
    return again + max(mlp, attention + remade - done)


def _size(kept: list[Kept]) -> int:
    return sum(one.bytes for one in kept)
