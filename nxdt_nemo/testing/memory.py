"""A run's bytes on each rank, counted, beside what nxdt_nemo.megatron.memory computes for it.

Room testing/. Runs in ranks whose pool was started with init="nxdt_nemo:activate", as nxdt_nemo.testing.ours does.
Proof: tests/testing/test_memory.py. The table: tools/memory.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nxdt_nemo.megatron.memory import Estimate, Job, Recompute, estimate
from nxdt_nemo.testing import ours
from nxdt_nemo.testing.mistakes import Training
from nxdt_nemo.testing.recipe import Layout, Recipe

__all__ = ["RECOMPUTE", "Case", "Measured", "measure"]

RECOMPUTE: Mapping[Recompute, Mapping[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Case:
    """What is run: two steps of a GPT's or a Llama's recipe in a layout.

    dropout   of hidden states and of attention's probabilities
    """

    recipe: Recipe
    layout: Layout = field(default_factory=Layout)
    recompute: Recompute = "none"
    dropout: float = 0.0

    @property
    def fields(self) -> dict[str, Any]:
        """Of the TransformerConfig."""
        drops = {"hidden_dropout": self.dropout, "attention_dropout": self.dropout}
        return {**RECOMPUTE[self.recompute], **drops}

    @property
    def job(self) -> Job:
        """The same for the formula."""
        recipe, layout, gated = self.recipe, self.layout, self.recipe.gated
        return Job(
            recipe.layers,
            recipe.hidden,
            recipe.ffn,
            recipe.heads,
            recipe.vocab,
            recipe.seq,
            recipe.micro_batch,
            recipe.micro_batches // layout.dp,
            groups=recipe.kv_groups,
            gated=gated,
            rms_norm=gated,
            bias=not gated,
            tied=not gated,
            rope=gated,
            dtype=recipe.dtype,
            tp=layout.tp,
            sp=layout.sp,
            cp=layout.cp,
            pp=layout.pp,
            dp=layout.dp,
            zero=layout.zero,
            recompute=self.recompute,
            hidden_dropout=self.dropout > 0,
            attention_dropout=self.dropout > 0,
            attention="scores" if self.dropout else "sdpa",
        )


@dataclass(frozen=True)
class Measured:
    """One rank's bytes; the names are those of memory.Estimate.

    left   what the second step left behind, beyond what was there when it began
    """

    stage: int
    weights: int
    fixed: int
    saved: int
    kept: int
    activations: int
    left: int

    def ratios(self, case: Case) -> dict[str, float]:
        """Counted / computed."""
        computed = self.computed(case)
        return {
            "weights": self.weights / computed.weights,
            "fixed": self.fixed / computed.fixed,
            "saved": self.saved / computed.saved_bytes,
            "kept": self.kept / computed.kept,
            "activations": self.activations / computed.activations,
            "peak": (self.fixed + self.activations) / computed.peak,
        }

    def computed(self, case: Case) -> Estimate:
        """What the formula says of this rank."""
        return estimate(case.job, self.stage)


def measure(case: Case) -> Measured:
    """On one rank of a pool: build, make two steps, count in the second. Moments are there from the first step on."""
    try:
        return _measure(case)
    finally:
        ours.forget_groups()


def _measure(case: Case) -> Measured:
    from megatron.core.distributed import finalize_model_grads

    from nxdt_nemo.testing.live_bytes import LiveBytes, SavedBytes

    recipe, layout = case.recipe, case.layout
    state = ours._model_parallel(recipe, layout)
    with LiveBytes() as live:
        model = ours._stages(recipe, layout, state, case.fields)
        weights = _settled(live)
        chunks, optimizer = ours._wrap(model, recipe, layout.zero)
        model[0].config.finalize_model_grads_func = finalize_model_grads
        training = Training(model, chunks, optimizer, [])
        saved = SavedBytes(model[0].parameters())
        with _first_forward(model[0], saved) as found:
            _step(training, case, 0)
        before = _settled(live)
        live.reset_peak()
        with _ends_of_forward(model[0], live) as ends:
            _step(training, case, 1)
        peak, left = live.peak, _settled(live) - before
    stage = state.get_pipeline_model_parallel_rank()
    return Measured(stage, weights, before, found[0], max(ends) - before, peak - before, left)


def _settled(live: Any) -> int:
    gc.collect()
    return int(live.now)


def _step(training: Training, case: Case, step: int) -> None:
    ours.gradients_of(training, case.recipe, case.layout, step)
    training.optimizer.step()


@contextmanager
def _first_forward(model: Any, saved: Any) -> Iterator[list[int]]:
    """Counts what the first forward pass inside the block saves."""
    found: list[int] = []

    def begin(*_: Any) -> None:
        if not found:
            saved.__enter__()

    def end(*_: Any) -> None:
        if not found:
            saved.__exit__(None, None, None)
            found.append(saved.bytes)

    with _hooks(model.register_forward_pre_hook(begin), model.register_forward_hook(end)):
        yield found


@contextmanager
def _ends_of_forward(model: Any, live: Any) -> Iterator[list[int]]:
    """Live bytes when each forward pass inside the block has ended."""
    found: list[int] = []
    with _hooks(model.register_forward_hook(lambda *_: found.append(live.now))):
        yield found


@contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
