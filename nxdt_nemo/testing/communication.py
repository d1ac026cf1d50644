"""What a layout sends in a step, counted, beside what it has to send.

Room testing/. `counted` runs in active ranks (see ours.py); `rows` is arithmetic on what they report and on
nxdt_nemo/megatron/communication.py. Used by tools/communication.py. Proof: tests/megatron/test_communication.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nxdt_nemo.megatron.communication import Model, Step, Term, sent, stages_of
from nxdt_nemo.megatron.parallel_state import DESCRIPTIONS
from nxdt_nemo.runtime.traffic import Sent, Traffic, count_traffic
from nxdt_nemo.testing.recipe import Layout, Recipe, transformer_fields

__all__ = ["LIMIT", "CommunicationRow", "Counted", "counted", "job_of", "rows"]

LIMIT = 1.02  # of bytes / least bytes, without an explanation
KINDS = {description: kind for kind, description in DESCRIPTIONS.items()}


@dataclass(frozen=True)
class Counted:
    """One rank's report: its pipeline stage, and what it sent in a step."""

    stage: int
    traffic: Traffic


@dataclass(frozen=True)
class CommunicationRow:
    """One collective in one kind of group, in a step, all ranks together.

    group     as parallel_state.DESCRIPTIONS calls it
    expected  bytes that communication.py knows of, necessary or not
    why       of what is not necessary
    places    lines that sent it, most bytes first
    """

    group: str
    collective: str
    calls: int
    bytes: int
    least: int
    expected: int
    why: str
    places: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """bytes / least."""
        return self.bytes / self.least if self.least else math.inf

    @property
    def known(self) -> bool:
        """True when what was counted is what communication.py expects."""
        return self.bytes == self.expected

    @property
    def good(self) -> bool:
        """True when nothing is sent but what is necessary, or explained, and all that is necessary is."""
        return self.known and (self.ratio <= LIMIT or bool(self.why))

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.good:
            return "UNEXPLAINED" if self.bytes >= self.expected else "TOO FEW"
        return "least" if self.ratio <= LIMIT else "explained"


def counted(recipe: Recipe, layout: Layout, fields: Mapping[str, Any] | None = None) -> Counted:
    """One rank's second step (in the first, groups are made). Weights are as they are initialized.

    fields  further ones of the TransformerConfig
    """
    from megatron.core import parallel_state

    from nxdt_nemo.testing.ours import forget_groups, gradients_of, set_up, update

    def step(number: int) -> None:
        gradients_of(training, recipe, layout, number)
        update(training.optimizer, recipe, number)

    try:
        training = set_up(recipe, None, layout, fields=fields)
        step(0)
        with count_traffic() as traffic:
            step(1)
        return Counted(parallel_state.get_pipeline_model_parallel_rank(), traffic)
    finally:
        forget_groups()


def job_of(recipe: Recipe, layout: Layout, fields: Mapping[str, Any] | None = None) -> tuple[Model, Step]:
    """A recipe and a layout as communication.py has them."""
    given = transformer_fields(recipe) | dict(fields or {})
    width = 2 if recipe.dtype == "bfloat16" else 4
    model = Model(
        layers=recipe.layers,
        hidden=recipe.hidden,
        heads=recipe.heads,
        kv_groups=recipe.kv_groups,
        head=recipe.hidden // recipe.heads,
        ffn=recipe.ffn,
        vocab=recipe.vocab,
        gated=recipe.gated,
        biases=not recipe.gated,
        norm=1 if recipe.gated else 2,
        learned=0 if recipe.gated else recipe.seq,
        tied=not recipe.gated,
        masked=recipe.family == "bert",
        logits=recipe.family in ("bert", "t5"),
        experts=recipe.experts,
        topk=given.get("moe_router_topk", 2),
        width=width,
    )
    step = Step(
        seq=recipe.seq,
        micro_batch=recipe.micro_batch,
        micro_batches=recipe.micro_batches // layout.dp,
        stages=_dealt(recipe, layout),
        tp=layout.tp,
        cp=layout.cp,
        dp=layout.dp,
        ep=layout.ep,
        etp=layout.etp or layout.tp,
        sp=layout.sp,
        zero=layout.zero,
        cp_comm=given.get("cp_comm_type", "p2p"),
        recompute=given.get("recompute_granularity") == "full",
        grouped=layout.grouped,
        static=layout.static,
    )
    return model, _with_encoder(recipe, step) if recipe.family == "t5" else step


def _dealt(recipe: Recipe, layout: Layout) -> tuple[tuple[int, ...], ...]:
    """Layers of each model chunk, for each pipeline rank."""
    return stages_of(
        recipe.layers,
        layout.pp,
        layout.chunks,
        first=layout.first,
        last=layout.last,
        account=layout.account,
        cut=[int(count) for count in layout.cut.split("-")] if layout.cut else (),
    )


def _with_encoder(recipe: Recipe, step: Step) -> Step:
    """A T5's: the first half of the pipeline has the encoder's layers, the other as many of the decoder's."""
    half = stages_of(recipe.layers, max(step.pp // 2, 1))
    encoder, stages = tuple(sum(one) for one in half), half
    if step.pp > 1:
        encoder, stages = (*encoder, *[0] * len(half)), (*[(0,)] * len(half), *half)
    return replace(step, seq=recipe.seq // 2, encoder_seq=recipe.seq, encoder=encoder, stages=stages)


def rows(model: Model, step: Step, ranks: Sequence[Counted]) -> list[CommunicationRow]:
    """What all ranks report, by group and collective. What arrives is left out: a send has counted it."""
    terms: dict[tuple[str, str], list[Term]] = {}
    for rank in ranks:
        for term in sent(model, step, rank.stage):
            terms.setdefault((term.group, term.collective), []).append(term)
    reports: dict[tuple[str, str], list[Sent]] = {}
    for rank in ranks:
        for (collective, group), one in rank.traffic.items():
            if collective != "recv":
                reports.setdefault((KINDS.get(group, group), collective), []).append(one)
    return [_row(*key, terms.get(key, []), reports.get(key, [])) for key in sorted(terms.keys() | reports.keys())]


def _row(group: str, collective: str, terms: list[Term], reports: list[Sent]) -> CommunicationRow:
    places = Counter[str]()
    for report in reports:
        places.update(report.places)
    reasons = {term.why: None for term in terms if term.bytes > LIMIT * term.least}
    return CommunicationRow(
        group,
        collective,
        calls=sum(report.calls for report in reports),
        bytes=sum(report.bytes for report in reports),
        least=sum(term.least for term in terms),
        expected=sum(term.bytes for term in terms),
        why="; ".join(reasons),
        places=tuple(place for place, _ in places.most_common()),
    )
