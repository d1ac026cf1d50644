"""Bytes of a training step on each rank, counted, beside the formula of docs/memory.md.

    python tools/memory.py                                # everything; writes docs/results/memory.md
    python tools/memory.py --model gpt --layouts one,tp2  # some of it; prints only

Counted are storages, in the second of two steps. Exit code 1 when a ratio is not between 0.9 and 1.1, or when a formula
of another recomputation fits. Uses nxdt_nemo.testing and the cpu lane only; at most 4 ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.megatron.memory import Recompute
from nxdt_nemo.testing.memory import RECOMPUTE, Case, Measured
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import FAMILIES, Family, Recipe, layout

LIMIT = 0.1
LAYOUTS = "one,tp2,tp2sp,pp2"
DROPPING = ("one", "tp2sp")  # layouts that are run with dropout too, in float32
SIZES = {"layers": 4, "hidden": 256, "vocab": 1024, "seq": 256, "micro_batch": 2}
BATCHES = {True: 4, False: 2}  # micro-batches: for several stages or replicas, and without
FFN = {"gpt": 1024, "llama": 688}
DTYPES = ("float32", "bfloat16")
DROPOUT = 0.1
RESULT = Path(__file__).parents[1] / "docs" / "results" / "memory.md"
STEP = ("model", "dtype", "layout", "recompute", "dropout", "stage")
ITEMS = ("fixed", "saved", "kept", "activations", "peak")


@dataclass
class Report:
    """The page's tables."""

    steps: Sheet = field(default_factory=lambda: Sheet("bytes of a step", (*STEP, *_columns(ITEMS), "verdict")))
    zero: Sheet = field(
        default_factory=lambda: Sheet(
            "ZeRO-1",
            ("model", "dtype", "layout", *_columns(("fixed", "peak")), "optimizer's state, counted", "verdict"),
        )
    )
    controls: Sheet = field(
        default_factory=lambda: Sheet(
            "negative controls", ("model", "run", "formula of", "saved", "activations", "verdict")
        )
    )

    @property
    def sheets(self) -> tuple[Sheet, Sheet, Sheet]:
        """In the page's order."""
        return self.steps, self.zero, self.controls

    def add_step(self, case: Case, found: Measured) -> None:
        """A rank's line."""
        good = all(abs(ratio - 1) <= LIMIT for ratio in found.ratios(case).values()) and found.left == 0
        place = [case.recipe.family, case.recipe.dtype, str(case.layout), case.recompute]
        cells = [*place, f"{case.dropout or '-'}", str(found.stage), *_numbers(case, found, ITEMS)]
        self.steps.lines.append(Line([*cells, "green" if good else "RED"], good))

    def add_zero(self, case: Case, found: Measured) -> None:
        """A rank's line."""
        ratios = found.ratios(case)
        good = all(abs(ratios[name] - 1) <= LIMIT for name in ("fixed", "peak"))
        state = found.fixed - found.weights - found.computed(case).gradients
        cells = [case.recipe.family, case.recipe.dtype, str(case.layout), *_numbers(case, found, ("fixed", "peak"))]
        self.zero.lines.append(Line([*cells, f"{state:,}", "green" if good else "RED"], good))

    def add_control(self, case: Case, found: Measured, other: Recompute) -> None:
        """The formula of a recomputation that was not the run's: it must not fit."""
        ratios = found.ratios(replace(case, recompute=other))
        bad = all(abs(ratios[name] - 1) > LIMIT for name in ("saved", "activations"))
        numbers = [f"{ratios[name]:.3f}" for name in ("saved", "activations")]
        cells = [
            case.recipe.family,
            case.recompute,
            other,
            *numbers,
            "red, as it must" if bad else "green, and must not be",
        ]
        self.controls.lines.append(Line(cells, bad))


def _columns(items: Sequence[str]) -> list[str]:
    return [text for item in items for text in (item, "formula", "ratio")]


def _numbers(case: Case, found: Measured, items: Sequence[str]) -> list[str]:
    computed = found.computed(case)
    formula = {"saved": computed.saved_bytes}
    counted = {"peak": found.fixed + found.activations}
    cells = []
    for item in items:
        ours, theirs = counted.get(item) or getattr(found, item), formula.get(item) or getattr(computed, item)
        cells += [f"{ours:,}", f"{theirs:,}", f"{ours / theirs:.3f}"]
    return cells


def case_of(family: Family, dtype: str, name: str, recompute: Recompute = "none") -> Case:
    """Activations outweigh constants, and a step takes some seconds."""
    place = layout(name)
    batches = BATCHES[place.pp > 1 or place.dp > 1]
    return Case(Recipe.of(family, ffn=FFN[family], dtype=dtype, micro_batches=batches, **SIZES), place, recompute)


@dataclass
class Ranks:
    """Pools that are kept, one for each number of ranks."""

    pools: dict[int, RankPool] = field(default_factory=dict)
    found: dict[Case, list[Measured]] = field(default_factory=dict)

    def measure(self, case: Case) -> list[Measured]:
        """Each rank's; a case is run once."""
        world = case.layout.world
        if world not in self.pools:
            self.pools[world] = RankPool(world, env=ACTIVE_ENV, init=ACTIVE)
        if case not in self.found:
            self.found[case] = self.pools[world].run("nxdt_nemo.testing.memory:measure", case)
        return self.found[case]

    def close(self) -> None:
        """End all ranks."""
        while self.pools:
            self.pools.popitem()[1].close()


def steps(report: Report, ranks: Ranks, family: Family, names: Sequence[str]) -> Iterator[str]:
    """Recomputation in each layout, and with dropout, where attention keeps its scores. Yields what is done."""
    for name, dtype, kind in product(names, DTYPES, RECOMPUTE):
        case = case_of(family, dtype, name, kind)
        drops = str(case.layout) in DROPPING and case.recipe.dtype == "float32"
        for one in (case, replace(case, dropout=DROPOUT)) if drops else (case,):
            found = ranks.measure(one)
            for stage in sorted({rank.stage for rank in found}):
                report.add_step(one, next(rank for rank in found if rank.stage == stage))
            last = report.steps.lines[-1]
            yield " ".join([*last.cells[: len(STEP)], last.cells[-1]])


def zero(report: Report, ranks: Ranks, family: Family) -> Iterator[str]:
    """ZeRO-1 off and on."""
    for dtype, name in product(DTYPES, ("dp4", "dp4+zero")):
        case = case_of(family, dtype, name)
        found = ranks.measure(case)
        report.add_zero(case, max(found, key=lambda one: one.fixed))
        yield f"{family}, {dtype}, {name}: {report.zero.lines[-1].cells[-1]}"


def controls(report: Report, ranks: Ranks, family: Family) -> Iterator[str]:
    """Formulas that must not fit."""
    for kind, other in (("none", "full"), ("full", "none")):
        case = case_of(family, "float32", "one", kind)
        report.add_control(case, ranks.measure(case)[0], other)
        yield f"{family}, {kind} by the formula of {other}: {report.controls.lines[-1].cells[-1]}"


def markdown(report: Report, command: str) -> str:
    """The file in docs/results."""
    return f"""# Memory

{heading(command)}
A plain megatron-core loop: {SIZES["layers"]} layers, hidden size {SIZES["hidden"]}, vocabulary {SIZES["vocab"]},
{BATCHES[False]} micro-batches of {SIZES["micro_batch"]} x {SIZES["seq"]} tokens, {BATCHES[True]} for several stages or
replicas. GPT with feed-forward size {FFN["gpt"]} and 8 heads, Llama with {FFN["llama"]}, 8 heads and 4 KV heads.
bfloat16 has float32 main parameters; gradients are added up in float32. Bytes on one rank of the stage, counted in the
second step (nxdt_nemo/testing/live_bytes.py) and computed (nxdt_nemo/megatron/memory.py, [memory.md](../memory.md)).
A row is green when each ratio is within 0.9 and 1.1, that of the weights too, and the step leaves nothing behind.

- fixed: weights, gradients and the optimizer's state, between two steps;
- saved: storages that autograd keeps of one micro-batch's forward pass, parameters excluded (saved-tensor hooks);
- kept: the most that is live beyond fixed at the end of a forward pass, all micro-batches in flight;
- activations: the most that is live beyond fixed at any moment of the step; peak: the same with fixed.

{report.steps.markdown}

With dropout core attention is megatron-core's own code, which keeps its probabilities; without it nothing of the size
of the scores is kept, so that selective recomputation has next to nothing to save.

## ZeRO-1 at four data-parallel ranks

The rank that has most.

{report.zero.markdown}

## Negative controls

Counted bytes, by the formula of another recomputation.

{report.controls.markdown}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=FAMILIES, action="append", help="default: both")
    parser.add_argument("--layouts", default="", help=f"comma separated; default: {LAYOUTS}, and ZeRO-1")
    args = parser.parse_args()
    console, report, ranks = Console(), Report(), Ranks()
    with console.status("starting ranks") as status:
        try:
            for family in args.model or FAMILIES:
                parts = [steps(report, ranks, family, (args.layouts or LAYOUTS).split(","))]
                if not args.layouts:
                    parts += [zero(report, ranks, family), controls(report, ranks, family)]
                for done in (done for part in parts for done in part):
                    status.update(done) if console.is_terminal else console.print(done)
        finally:
            ranks.close()
    show(report.sheets, console)
    if len(sys.argv) == 1:
        RESULT.write_text(markdown(report, "python tools/memory.py"))
    return 0 if all(sheet.good for sheet in report.sheets) else 1


if __name__ == "__main__":
    sys.exit(main())
