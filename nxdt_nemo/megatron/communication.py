"""What a layout has to send in a step, and what is sent: arithmetic, before there are ranks.

Room megatron/. Stands in for nothing of upstream's; its numbers are those of megatron-core 0.13.1's schedules, layers,
gradient buffers and optimizers with this backend's attention, and of one stack of layers (GPT, Llama, Mixtral, BERT) or
of an encoder and a decoder (T5). No torch.
Derivations: docs/communication.md. Proof: tests/megatron/test_communication.py, tools/communication.py, which hold it
against what runtime/traffic.py counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from nxdt_nemo.errors import LayoutError

__all__ = ["Model", "Step", "Term", "sent", "stages_of"]

GRADIENT = 4  # bytes of a gradient where it is reduced: float32 (grad_reduce_in_fp32)
LOSS = 4  # and of the loss, of a router's probability, of a norm
COUNT = 8  # of a number of tokens

NOT_LEFT_OUT = "the second run of a layer sends its experts' results too: the last sum is left out of dense layers only"
NOT_CUT = (
    "upstream adds learned positions before it cuts the sequence, so it all-reduces where a reduce-scatter would do"
)
WHOLE = "with ZeRO-1 a rank needs the sum of its own part only; upstream sums the whole gradient"
PADDED = "megatron-core pads parameters to 64 elements and buckets to a multiple of 128 and of the ranks"
EXACT = "gradients of keys and values are added up in float32, whatever the model's dtype is"
UPCAST = "upstream sends the experts' results in the router's dtype"
EACH_LAYER = (
    "each of a decoder's layers gathers the encoder's output and sums its gradient; once for a stage's layers would do"
)
FIXED = "in fixed shapes each expert has room for every token, and what is not routed is sent too"


@dataclass(frozen=True)
class Model:
    """A model's sizes; vocab is the padded one. layers of a T5 are its encoder's, and as many its decoder's.

    head     features of a head
    gated    SwiGLU: the MLP's first projection is twice as wide
    biases   of the linear layers
    norm     vectors of a norm: 1 RMSNorm, 2 LayerNorm
    learned  rows of learned positions, 0 without
    tied     the output layer's weight is the embedding's
    masked   a BERT's head: a dense layer and a norm before the output layer
    logits   the output layer has biases (BERT, T5)
    experts  of size ffn each, of which a token sees topk; 0: one MLP
    balanced a loss counts the tokens of each expert (aux_loss)
    width    bytes of a parameter and of an activation
    """

    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head: int
    ffn: int
    vocab: int
    gated: bool = False
    biases: bool = True
    norm: int = 2
    learned: int = 0
    tied: bool = True
    masked: bool = False
    logits: bool = False
    experts: int = 0
    topk: int = 2
    balanced: bool = True
    width: int = 4


@dataclass(frozen=True)
class Step:
    """A layout and what goes through it in a step.

    stages         layers of each model chunk, for each pipeline rank (stages_of)
    micro_batches  of a data-parallel rank
    etp            the experts' tensor parallel size
    recompute      full, layer by layer
    grouped        a rank's experts in two parameters
    static         experts in tensors with room for all tokens at each of them (moe_dropless_bound: worst)
    encoder        layers of an encoder before these, for each pipeline rank; (): no encoder. A rank has layers of one
                   kind, or the pipeline has one rank
    encoder_seq    its tokens; seq is then the decoder's
    """

    seq: int
    micro_batch: int
    micro_batches: int
    stages: tuple[tuple[int, ...], ...]
    tp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool = False
    zero: bool = False
    cp_comm: Literal["p2p", "a2a", "all_gather"] = "p2p"
    recompute: bool = False
    grouped: bool = False
    static: bool = False
    encoder: tuple[int, ...] = ()
    encoder_seq: int = 0

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return len(self.stages)

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.etp * self.ep * self.pp)


@dataclass(frozen=True)
class Term:
    """What one rank sends in a step for one purpose.

    group       key of parallel_state.DESCRIPTIONS, or "kv copies"
    collective  and bytes as runtime/traffic.py counts them: the whole tensor's
    least       bytes that the layout cannot do without
    why         the difference, where there is one
    """

    group: str
    collective: str
    what: str
    bytes: int
    least: int
    why: str = ""


def stages_of(
    layers: int,
    pp: int = 1,
    chunks: int = 1,
    *,
    first: int = 0,
    last: int = 0,
    account: bool = False,
    cut: Sequence[int] = (),
) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk for each pipeline rank, as megatron-core deals them out.

    first, last  layers of the first and of the last stage, 0: as many as the others have
    account      the embedding and the loss count as a layer each
    cut          layers of each stage or chunk in the order of the pipeline: nothing is left to deal out
    Raises LayoutError if they do not come out even.
    """
    if cut:
        if sum(cut) != layers or len(cut) != pp * chunks:
            raise LayoutError(f"{cut} does not cut {layers} layers for {pp} pipeline ranks of {chunks} chunks")
        return tuple(tuple(cut[stage::pp]) for stage in range(pp))
    rest = layers + 2 * account - first - last
    ranks = pp - bool(first) - bool(last)
    each, odd = divmod(rest, max(ranks, 1))
    held = [*([first] if first else []), *[each] * ranks, *([last] if last else [])]
    if odd or (rest and not ranks) or any(count % chunks for count in held):
        raise LayoutError(f"{layers} layers cannot be dealt out to {pp} pipeline ranks of {chunks} chunks")
    dealt = [[count // chunks] * chunks for count in held]
    if account:
        dealt[0][0] -= 1
        dealt[-1][-1] -= 1
    return tuple(tuple(one) for one in dealt)


def sent(model: Model, step: Step, stage: int) -> list[Term]:
    """Everything that a rank of this pipeline stage sends in a step; groups of one rank send nothing.

    Between experts' ranks it depends on the routing how much a rank sends; what stands there is the mean over the
    ranks of the stage, to which without dropped tokens they add up.
    """
    if step.encoder and not _known(model, step):
        raise LayoutError("no arithmetic of an encoder with recomputation, cp, chunks, experts, or pp and dp together")
    rank = _Rank(model, step, stage)
    parts = [rank.layers(), rank.encoder(), rank.ends(), rank.pipeline(), rank.attention(), rank.experts()]
    parts += [rank.fixed_shapes(), rank.gradients(), rank.norm()]
    return [term for term in chain(*parts) if term.bytes]


def _known(model: Model, step: Step) -> bool:
    """Of a model with an encoder. With pp and dp, ranks would also reduce the output layer that upstream gives the
    encoder's last stage, and that nothing reads."""
    plain = step.cp == 1 and len(step.stages[0]) == 1 and not step.recompute and not model.experts
    return plain and (step.pp == 1 or step.dp == 1)


def _bucket(sizes: Sequence[int], ranks: int) -> int:
    """Elements of a bucket of megatron-core's distributed optimizer."""
    aligned = sum(-(-size // 64) * 64 for size in sizes[:-1]) + sum(sizes[-1:])
    unit = math.lcm(ranks, 128)
    return -(-aligned // unit) * unit


@dataclass(frozen=True)
class _Rank:
    """A rank of a pipeline stage."""

    model: Model
    step: Step
    stage: int

    # --- sizes ------------------------------------------------------------------------------------------------------

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.step.pp - 1

    @property
    def first_of_decoder(self) -> bool:
        """Of layers that read tokens of their own: without an encoder the first stage."""
        return self.stage == next((i for i, layers in enumerate(self.step.stages) if sum(layers)), 0)

    @property
    def encoder_layers(self) -> int:
        return self.step.encoder[self.stage] if self.step.encoder else 0

    @property
    def runs(self) -> int:
        """Layers times micro-batches."""
        return sum(self.step.stages[self.stage]) * self.step.micro_batches

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a context-parallel rank."""
        return self.step.seq // self.step.cp * self.step.micro_batch

    @property
    def activation(self) -> int:
        """Bytes of [S, B, H]."""
        return self.tokens * self.model.hidden * self.model.width

    @property
    def encoded(self) -> int:
        """Bytes of an encoder's [S, B, H]."""
        return self.step.encoder_seq * self.step.micro_batch * self.model.hidden * self.model.width

    @property
    def groups(self) -> int:
        """KV heads of a tensor-parallel rank."""
        return max(self.model.kv_groups // self.step.tp, 1)

    # --- tensor parallelism -----------------------------------------------------------------------------------------

    def layers(self) -> Iterator[Term]:
        """Of the layers' linear layers; experts bring their own (see experts)."""
        if self.step.tp == 1:
            return
        n = self.activation * self.runs
        blocks = 1 if self.model.experts else 2
        if not self.step.sp:
            yield self._same("tp", "all_reduce", "results of row-parallel layers", blocks * n)
            yield self._same("tp", "all_reduce", "gradients of column-parallel layers' inputs", blocks * n)
            if self.step.recompute:  # the layer's last sum is not needed for gradients
                yield self._same("tp", "all_reduce", "results once more", n)
            return
        yield self._same("tp", "all_gather", "inputs of column-parallel layers", blocks * n)
        yield self._same("tp", "reduce_scatter", "results of row-parallel layers", blocks * n)
        yield self._same("tp", "all_gather", "gradients of these results", blocks * n)
        yield self._same("tp", "all_gather", "inputs once more, for weight gradients", blocks * n)
        yield self._same("tp", "reduce_scatter", "gradients of the inputs", blocks * n)
        if self.step.recompute:
            yield self._same("tp", "all_gather", "inputs of layers that run again", blocks * n)
            yield self._same("tp", "reduce_scatter", "results of layers that run again, but the last", n)

    def encoder(self) -> Iterator[Term]:
        """Of an encoder's layers, and of cross attention in a decoder's, whose keys and values are of what it gives."""
        step = self.step
        if step.tp == 1 or not step.encoder:
            return
        pairs = 2 * self.encoded * self.encoder_layers * step.micro_batches + self.activation * self.runs
        each, once = self.encoded * self.runs, self.encoded * step.micro_batches * bool(self.runs)

        def inputs(collective: str, what: str) -> Term:
            return Term("tp", collective, what, pairs + each, pairs + once, EACH_LAYER)

        if not step.sp:
            yield self._same("tp", "all_reduce", "results of the encoder's and of cross attention's layers", pairs)
            yield inputs("all_reduce", "gradients of their inputs")
            return
        yield inputs("all_gather", "inputs of the encoder's and of cross attention's layers")
        yield self._same("tp", "reduce_scatter", "their results", pairs)
        yield self._same("tp", "all_gather", "gradients of their results", pairs)
        yield inputs("all_gather", "their inputs once more, for weight gradients")
        yield inputs("reduce_scatter", "gradients of their inputs")

    def ends(self) -> Iterator[Term]:
        """Of the embedding, the output layer and the loss."""
        if self.step.tp == 1:
            return
        n, batches = self.activation * self.step.micro_batches, self.step.micro_batches
        if self.first_of_decoder if self.step.encoder else self.first:
            yield from self._embedding(n)
        if self.first and self.step.encoder:
            yield from self._embedding(self.encoded * batches)
        if self.last:
            yield from self._output(n)
            three = 3 * self.tokens * LOSS * batches
            yield self._same("tp", "all_reduce", "largest logit, the target's, sum of exponents", three)

    def _embedding(self, n: int) -> Iterator[Term]:
        if not self.step.sp:
            yield self._same("tp", "all_reduce", "embeddings", n)
            return
        if self.model.learned:  # what an all-reduce moves of n bytes, a reduce-scatter does of 2 n
            yield Term("tp", "all_reduce", "embeddings", n, n // 2, NOT_CUT)
        else:
            yield self._same("tp", "reduce_scatter", "embeddings", n)
        yield self._same("tp", "all_gather", "gradients of the embeddings", n)

    def _output(self, n: int) -> Iterator[Term]:
        if not self.step.sp:
            yield self._same("tp", "all_reduce", "gradients of the output layer's input", n)
            return
        yield self._same("tp", "all_gather", "input of the output layer, twice", 2 * n)
        yield self._same("tp", "reduce_scatter", "gradients of the output layer's input", n)

    # --- pipeline ---------------------------------------------------------------------------------------------------

    def pipeline(self) -> Iterator[Term]:
        """Activations to the next stage, their gradients to the one before, and gradients of embeddings' copies."""
        pp, chunks = self.step.pp, len(self.step.stages[0])
        if pp == 1:
            return
        places = [chunk * pp + self.stage for chunk in range(chunks)]
        ahead = sum(self._boundary(place) for place in places if place < pp * chunks - 1)
        yield self._same("pp", "send", "activations", ahead)
        back = sum(self._boundary(place - 1) for place in places if place > 0)
        yield self._same("pp", "send", "gradients of activations", back)
        ranks = self.step.dp * self.step.cp if self.step.zero else 1
        reads = self.first or (self.first_of_decoder and bool(self.step.encoder))
        if self.model.tied and (reads or self.last):
            weight = self._word_embedding() * GRADIENT
            yield Term("embedding", "all_reduce", "tied weights' gradients", weight, weight // ranks, WHOLE)
        if self.step.encoder and reads:
            rows = self.model.learned * self.model.hidden * GRADIENT
            yield Term("position-embedding", "all_reduce", "positions' gradients", rows, rows // ranks, WHOLE)

    def _boundary(self, place: int) -> int:
        """Bytes that go on from a place of the pipeline: a decoder hands on what its encoder gave, too."""
        cut = self.step.tp if self.step.sp else 1
        if not self.step.encoder:
            return self.activation * self.step.micro_batches // cut
        decodes = sum(self.step.stages[place]) > 0
        return (self.encoded + self.activation * decodes) * self.step.micro_batches // cut

    # --- context parallelism ----------------------------------------------------------------------------------------

    def attention(self) -> Iterator[Term]:
        """Keys and values, see nxdt_nemo/megatron/transformer/context_parallel.py."""
        ranks = self.step.cp
        if ranks == 1:
            return
        forwards = 2 if self.step.recompute else 1
        both = 2 * self.groups * self.model.head * self.tokens * self.runs
        kv, exact = both * self.model.width, both * max(self.model.width, 4)
        if self.step.cp_comm == "a2a":
            heads = self.model.heads // self.step.tp
            each = (2 * heads * self.model.head * self.tokens * self.runs + both) * self.model.width
            yield self._same("cp", "all_to_all", "query, key, value and result", each * forwards)
            yield self._same("cp", "all_to_all", "their gradients", each)
        elif self.step.cp_comm == "all_gather":
            yield self._same("cp", "all_gather", "keys and values", ranks * kv * forwards)
            yield self._same("cp", "all_gather", "keys and values once more, in backward", ranks * kv)
            yield Term("cp", "reduce_scatter", "their gradients", ranks * exact, ranks * kv, EXACT)
        else:
            yield self._same("cp", "send", "keys and values", (ranks - 1) * kv * forwards)
            yield self._same("cp", "send", "keys and values once more, in backward", (ranks - 1) * kv)
            yield Term("cp", "send", "their gradients", (ranks - 1) * exact, (ranks - 1) * kv, EXACT)

    # --- experts ----------------------------------------------------------------------------------------------------

    def experts(self) -> Iterator[Term]:
        """Tokens to their experts and back, by upstream's all-to-all dispatcher, none dropped."""
        model, step = self.model, self.step
        if not model.experts:
            return
        passes = 2 if step.recompute else 1
        if model.balanced and step.tp * step.cp > 1:
            yield self._same(
                "tp-cp", "all_reduce", "tokens of each expert, for the loss", model.experts * COUNT * self.runs
            )
        if step.ep * step.etp > 1 and not step.static:
            counts = step.ep * step.etp * model.experts * COUNT * self.runs * passes
            yield self._same("expert-tp-ep", "all_gather", "tokens of each expert", counts)
        rows = self.tokens // (step.tp if step.sp else 1) * model.topk * self.runs
        row = model.hidden * model.width
        if step.ep > 1:
            yield self._same("ep", "all_to_all", "tokens and probabilities to experts", rows * (row + LOSS) * passes)
            yield self._same("ep", "all_to_all", "results back", rows * row)
            yield self._same("ep", "all_to_all", "gradients of both", rows * (2 * row + LOSS))
        if step.etp > 1:
            yield from self._expert_tensor_parallel(rows * step.etp, row, passes)

    def fixed_shapes(self) -> Iterator[Term]:
        """What experts in fixed shapes send beyond that: rows of no token of theirs, see StaticTokenDispatcher."""
        model, step = self.model, self.step
        if not model.experts or not step.static:
            return
        rows = self.tokens // (step.tp if step.sp else 1) * (model.experts - model.topk) * self.runs
        row, wide = model.hidden * model.width, model.hidden * LOSS
        passes = 2 if step.recompute else 1
        if step.ep > 1:
            sent = rows * ((row + LOSS) * passes + 3 * row + LOSS)
            yield Term("ep", "all_to_all", "rows of no token", sent, 0, FIXED)
        if step.etp > 1:
            there, back = rows * step.etp * (row + LOSS), rows * step.etp * wide
            yield Term("expert-tp", "all_gather", "rows of no token", there * passes + back, 0, FIXED)
            yield Term("expert-tp", "reduce_scatter", "their results and gradients", back + there, 0, FIXED)

    def _expert_tensor_parallel(self, rows: int, row: int, passes: int) -> Iterator[Term]:
        exact = self.model.hidden * LOSS
        why = "" if exact == row else UPCAST
        gathered = "tokens and probabilities of all"
        yield self._same("expert-tp", "all_gather", gathered, rows * (row + LOSS) * passes)
        yield Term("expert-tp", "reduce_scatter", "results", rows * exact, rows * row, why)
        again = rows * exact * (passes - 1)
        yield Term("expert-tp", "reduce_scatter", "results of layers that run again", again, 0, NOT_LEFT_OUT)
        yield Term("expert-tp", "all_gather", "gradients of the results", rows * exact, rows * row, why)
        yield self._same("expert-tp", "reduce_scatter", f"gradients of {gathered}", rows * (row + LOSS))

    # --- gradients --------------------------------------------------------------------------------------------------

    def gradients(self) -> Iterator[Term]:
        """Once a step: of what ranks have copies of."""
        yield from self._replicas("dp-cp", self.step.dp * self.step.cp, self._dense())
        yield from self._replicas("expert-dp", self.step.expert_dp, self._expert())
        layers, tp = sum(self.step.stages[self.stage]), self.step.tp
        if self.step.sp and tp > 1:
            copied = layers * sum(self._copied()) + sum(self._head_copied())
            if self.step.encoder:
                copied += layers * sum(self._cross_copied()) + self.encoder_layers * sum(self._copied())
            yield self._same("tp", "all_reduce", "gradients of norms, biases and routers", copied * GRADIENT)
        if tp > self.model.kv_groups:
            each = 2 * self.model.head * (self.model.hidden + self.model.biases)
            yield self._same("kv copies", "all_reduce", "gradients of copies of KV heads", layers * each * GRADIENT)

    def _replicas(self, group: str, ranks: int, chunks: list[list[list[int]]]) -> Iterator[Term]:
        """Of data-parallel ranks. chunks: for each model chunk the parameters' sizes in each bucket."""
        if ranks == 1:
            return
        elements = sum(sum(bucket) for chunk in chunks for bucket in chunk)
        if not self.step.zero:
            yield self._same(group, "all_reduce", "gradients", elements * GRADIENT)
            return
        padded = sum(_bucket(bucket, ranks) for chunk in chunks for bucket in chunk if bucket)
        for collective, what, width in (
            ("reduce_scatter", "gradients", GRADIENT), ("all_gather", "parameters", self.model.width)
        ):  # fmt: skip
            yield Term(group, collective, what, padded * width, elements * width, PADDED)

    def _dense(self) -> list[list[list[int]]]:
        """All other parameters. A tied embedding has a bucket of its own where pipelines and ZeRO-1 meet."""
        model, found = self.model, []
        tied, word = model.tied and self.step.pp > 1, [self._word_embedding()]
        for chunk, layers in enumerate(self.step.stages[self.stage]):
            params, alone = [size for _ in range(layers) for size in self._layer()], []
            if self.step.encoder:
                params += [size for _ in range(layers) for size in self._cross_attention()]
                params += [size for _ in range(self.encoder_layers) for size in self._layer()]
            reads = self.first or (self.first_of_decoder and bool(self.step.encoder))
            if reads and chunk == 0:
                params += [model.learned * model.hidden] if model.learned else []
                alone += word
            if self.last and chunk == len(self.step.stages[self.stage]) - 1:
                params += [model.vocab // self.step.tp] if model.logits else []
                alone += word if (tied and not reads) or not model.tied else []
            if chunk == len(self.step.stages[self.stage]) - 1:
                params += self._head_copied()
            found.append([params, alone] if tied else [[*params, *alone]])
        return found

    def _expert(self) -> list[list[list[int]]]:
        """Parameters of experts that ranks divide."""
        if self.step.ep == 1:
            return []
        return [[self._experts_of_a_layer() * layers] for layers in self.step.stages[self.stage]]

    def _experts_of_a_layer(self) -> list[int]:
        model, rows, here = self.model, self.model.ffn // self.step.etp, self.model.experts // self.step.ep
        if self.step.grouped:
            rows, here = rows * here, 1
        return [(2 if model.gated else 1) * rows * model.hidden, model.hidden * rows] * here

    def _word_embedding(self) -> int:
        return self.model.vocab // self.step.tp * self.model.hidden

    def _copied(self) -> list[int]:
        """Parameters of a layer that tensor-parallel ranks have alike: norms, row-parallel layers' biases, routers."""
        hidden = self.model.hidden
        biases = (1 if self.model.experts else 2) * self.model.biases
        return [hidden] * (2 * self.model.norm + biases) + ([self.model.experts * hidden] if self.model.experts else [])

    def _head_copied(self) -> list[int]:
        """What tensor-parallel ranks have alike after a stack's last layer: a norm; a BERT's dense layer and norm."""
        model, hidden = self.model, self.model.hidden
        ends = self.last + (self.encoder_layers > 0 and self._last_of_encoder)
        head = [hidden * hidden, hidden, *[hidden] * model.norm] if model.masked and self.last else []
        return [hidden] * model.norm * ends + head

    @property
    def _last_of_encoder(self) -> bool:
        return not any(self.step.encoder[self.stage + 1 :])

    def _cross_copied(self) -> list[int]:
        """Of a layer's cross attention: its norm, and its row-parallel layer's biases."""
        return [self.model.hidden] * (self.model.norm + self.model.biases)

    def _cross_attention(self) -> list[int]:
        """Parameters of a layer's cross attention: queries, keys and values, projection."""
        queries = self.model.heads // self.step.tp * self.model.head
        cut = [queries * self.model.hidden, 2 * queries * self.model.hidden, queries * self.model.hidden]
        return [*cut, *([queries, 2 * queries] if self.model.biases else []), *self._cross_copied()]

    def _layer(self) -> list[int]:
        """Parameters of a layer, but of experts that ranks divide."""
        model, tp = self.model, self.step.tp
        queries, keys = model.heads // tp * model.head, 2 * self.groups * model.head
        inner = 0 if model.experts else (2 if model.gated else 1) * model.ffn // tp
        split = [queries, keys] if tp > model.kv_groups else [queries + keys]
        cut = [rows * model.hidden for rows in split] + [queries * model.hidden]
        cut += [] if model.experts else [inner * model.hidden, model.ffn // tp * model.hidden]
        if model.biases:
            cut += [*split, *([] if model.experts else [inner])]
        return [*cut, *self._copied(), *(self._experts_of_a_layer() if self.step.ep == 1 else [])]

    # --- control ----------------------------------------------------------------------------------------------------

    def norm(self) -> Iterator[Term]:
        """The gradients' norm, one number; that of divided experts apart, but with the sharded optimizer."""
        step, groups = self.step, {"tp-pp": self.step.tp * self.step.pp}
        if step.ep > 1:
            groups["expert-tp-ep-pp"] = step.etp * step.ep * step.pp
        for group, ranks in ({"optimizer-instance": step.world} if step.zero else groups).items():
            if ranks > 1:
                yield self._same(group, "all_reduce", "norm of the gradients", LOSS)

    @staticmethod
    def _same(group: str, collective: str, what: str, sent: int) -> Term:
        return Term(group, collective, what, sent, sent)
