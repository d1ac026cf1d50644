"""The sharded optimizers in tables: memory, parity with the unsharded ones, checkpoints resumed in other layouts.

    python tools/zero.py                   # everything, 11 minutes; writes docs/results/zero.md
    python tools/zero.py --model gpt       # one model; prints only
    python tools/zero.py --level megatron  # without NeMo, 4 minutes; prints only

Parity rows are those of tools/parity.py: loss and grad norm of every step, each parameter's gradient of step 1, here
against the unsharded optimizer in the same layout. Exit code 1 when a row is not as it must be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from parity_lib.sheet import PARITY_COLUMNS, Line, Sheet, heading, parity_line, show
from rich.console import Console

from nxdt_nemo.testing.parity import NO_CLIPPING, Errors, Parity, Row, relative
from nxdt_nemo.testing.recipe import FAMILIES, Family, Recipe, layout
from nxdt_nemo.testing.reference import Trained

SHARE = 1.01  # of bytes a rank x ranks / bytes unsharded
PARITY = 1e-6
TO_THE_BIT = Errors(0.0, PARITY, 0.0, 0.0, "")  # without clipping; the norm's squares are added up in another order
LAYOUTS = ("dp2", "dp4", "tp2dp2", "tp2spdp2", "pp2dp2")
NEMO_LAYOUTS = ("dp2", "tp2spdp2", "pp2dp2")
NEMO_NAMES = ("distributed_fused_adam", "mcore_distributed_optim")
RESUMED = ("one", "one+zero", "dp2", "dp2+zero", "tp2+zero", "pp2+zero", "dp4+zero", "tp2dp2+zero", "pp2dp2+zero")
RESULT = Path(__file__).parents[1] / "docs" / "results" / "zero.md"


@dataclass
class Report:
    """The page's tables."""

    memory: Sheet = field(
        default_factory=lambda: Sheet(
            "bytes of optimizer state",
            ("model", "optimizer", "dtype", "ranks", "a rank", "unsharded", "a rank x ranks / unsharded", "verdict"),
        )
    )
    parity: Sheet = field(default_factory=lambda: Sheet("sharded against unsharded, relative errors", PARITY_COLUMNS))
    resume: Sheet = field(
        default_factory=lambda: Sheet(
            "checkpoints resumed, relative errors against the run that was not stopped",
            ("model", "saved by", "resumed in", "loss", "grad norm", "tolerance", "verdict"),
        )
    )

    @property
    def sheets(self) -> tuple[Sheet, Sheet, Sheet]:
        """In the page's order."""
        return self.memory, self.parity, self.resume

    def add_memory(self, recipe: Recipe, optimizer: str, ranks: list[int], whole: int) -> str:
        """A line of bytes: each rank's, and what one rank of the unsharded optimizer holds. Returns it as text."""
        share = max(ranks) * len(ranks) / whole
        good = share <= SHARE and sum(ranks) >= whole
        cells = [recipe.family, optimizer, recipe.dtype, f"dp{len(ranks)}", f"{max(ranks):,}", f"{whole:,}"]
        self.memory.lines.append(Line([*cells, f"{share:.4f}", "green" if good else "RED"], good))
        return f"{recipe.family}: {optimizer}, dp{len(ranks)}, {share:.4f}"

    def add_parity(self, row: Row) -> str:
        """A line of parity. Returns it as text."""
        self.parity.lines.append(parity_line(row))
        return f"{row.family}: {row.left}, worst error {row.errors.worst:.1e}"

    def add_resume(self, recipe: Recipe, saved: str, resumed: str, errors: Errors, must_fail: bool = False) -> str:
        """A line of a resumed run. Returns it as text."""
        row = Row(recipe.family, saved, resumed, PARITY, errors, must_fail)
        numbers = [f"{errors.loss:.1e}", f"{errors.norm:.1e}", f"{PARITY:.0e}"]
        self.resume.lines.append(Line([recipe.family, saved, resumed, *numbers, row.verdict], row.good))
        return f"{recipe.family}: {saved} resumed in {resumed}, worst error {errors.worst:.1e}"


def megatron(report: Report, parity: Parity, family: Family, steps: int) -> Iterator[str]:
    """A plain megatron-core loop. Yields what has been done, for the terminal."""
    recipe = Recipe.of(family, steps=steps)
    for name in LAYOUTS:
        yield report.add_parity(parity.zero_against_unsharded(recipe, layout(name), PARITY))
    yield report.add_parity(parity.zero_against_unsharded(recipe, layout("dp2"), PARITY, "one gradient x 1.01"))
    half = replace(recipe, dtype="bfloat16", clip=NO_CLIPPING)
    for name in ("dp2", "dp4"):
        yield report.add_parity(parity.zero_against_unsharded(half, layout(name), TO_THE_BIT))
    for each, name in product((recipe, half), ("dp2", "dp4")):
        [whole, *_] = parity.state_bytes(each, layout(name))
        yield report.add_memory(each, "megatron-core", parity.state_bytes(each, layout(f"{name}+zero")), whole)
    yield from resumed(report, parity, family)


def resumed(report: Report, parity: Parity, family: Family) -> Iterator[str]:
    """Three steps in dp2+zero, a checkpoint, three more in another layout."""
    recipe, home = Recipe.of(family, steps=6), layout("dp2+zero")
    with tempfile.TemporaryDirectory(prefix="nxdt_nemo_zero_") as folder:
        saved, stock = Path(folder) / "saved", Path(folder) / "stock"
        whole = parity.leg(recipe, home, range(6))
        parity.leg(recipe, home, range(3), save=saved)
        for name in RESUMED:
            rest = parity.leg(recipe, layout(name), range(3, 6), resume=saved)
            yield report.add_resume(recipe, f"{home}", name, later(rest, whole))
        rest = parity.stock_leg(recipe, range(3, 6), resume=saved)
        yield report.add_resume(recipe, f"{home}", "stock megatron-core", later(rest, whole))
        rest = parity.leg(recipe, home, range(3, 6), resume=saved, fault="moments not resumed")
        yield report.add_resume(recipe, f"{home}", f"{home}, moments not resumed", later(rest, whole), must_fail=True)
        whole = parity.stock_leg(recipe, range(6))
        parity.stock_leg(recipe, range(3), save=stock)
        rest = parity.leg(recipe, home, range(3, 6), resume=stock)
        yield report.add_resume(recipe, "stock megatron-core", f"{home}", later(rest, whole))


def later(rest: Trained, whole: Trained) -> Errors:
    """A resumed run's steps against the same steps of the run that was not stopped."""
    count = len(rest.losses)
    norm = relative(rest.grad_norms, whole.grad_norms[-count:])
    return Errors(relative(rest.losses, whole.losses[-count:]), norm, 0.0, 0.0, "")


def nemo(report: Report, parity: Parity, family: Family, steps: int) -> Iterator[str]:
    """MegatronGPTModel under trainer.fit. Yields what has been done, for the terminal.

    Without weight decay: NeMo gives megatron-core's optimizer other groups for it than fused_adam.
    """
    recipe = Recipe.of(family, steps=steps, weight_decay=0.0)
    half = replace(recipe, dtype="bfloat16")
    for place, name in product(NEMO_LAYOUTS, NEMO_NAMES):
        yield report.add_parity(parity.nemo_zero_against_unsharded(recipe, layout(place), name, PARITY))
    overlap = {"model__optim__overlap_grad_sync": True, "model__optim__overlap_param_sync": True}
    if family == "gpt":
        row = parity.nemo_zero_against_unsharded(recipe, layout("dp2"), "mcore_distributed_optim", PARITY, **overlap)
        yield report.add_parity(row)
    limits = parity.order_noise(half).times(2)
    for name in NEMO_NAMES:
        yield report.add_parity(parity.nemo_zero_against_unsharded(half, layout("dp2"), name, limits))
    for each, name in product((recipe, half), NEMO_NAMES):
        [whole, *_] = parity.nemo_state_bytes(each, layout("dp2"))
        few = replace(each, steps=4)  # bytes do not depend on steps
        for run, place in ((each, "dp2"), (few, "dp4")) if family == "gpt" else ((each, "dp2"),):
            ranks = parity.nemo_state_bytes(run, layout(place), model__optim__name=name)
            yield report.add_memory(each, name, ranks, whole)


LEVELS = {"megatron": megatron, "nemo": nemo}


def markdown(report: Report, command: str, steps: int) -> str:
    """The file in docs/results."""
    return f"""# ZeRO-1: sharded optimizers

{heading(command)}
The models, the data and what an error is are those of parity.md: {steps} steps of a 4-layer model, learning rate 2e-3
(Llama 1e-3), clipping at 1.0. `+zero` is megatron-core's distributed optimizer in a plain megatron-core loop; "NeMo"
is MegatronGPTModel under trainer.fit with the named optimizer.

## Memory

Bytes of moments and float32 main parameters on the rank that has most of them, beyond the model's own memory.
Limit: {SHARE}.

{report.memory.markdown}

## Parity with the unsharded optimizer in the same layout

{report.parity.markdown}

At NeMo's level bf16 (megatron_amp_O2) is held to twice what changes on one rank when each product with a weight is
added up as two halves, each rounded to bf16: gradients are equal to the bit, but the norm's squares are added up in
another order, and a clipping factor that differs in its last place rounds some bf16 weight the other way. Without
clipping nothing is left of that, and losses and gradients have to be equal to the bit.

## Checkpoints resumed

Three steps, a checkpoint, three more steps in another layout or by upstream's own code on one rank (stock
megatron-core with torch's AdamW; this backend is not active in its process), against six steps without a stop.

{report.resume.markdown}

Rows with a mistake are negative controls: the error was put in on purpose.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=FAMILIES, action="append", help="default: both")
    parser.add_argument("--level", choices=LEVELS, action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name} for a partial run too")
    args = parser.parse_args()
    console, report = Console(), Report()
    with Parity() as parity, console.status("starting ranks") as status:
        for level, family in product(args.level or LEVELS, args.model or FAMILIES):
            for done in LEVELS[level](report, parity, family, args.steps):
                status.update(done)
    show(report.sheets, console)
    if len(sys.argv) == 1 or args.write:
        RESULT.write_text(markdown(report, " ".join(["python tools/zero.py", *sys.argv[1:]]), args.steps))
    return 0 if all(sheet.good for sheet in report.sheets) else 1


if __name__ == "__main__":
    sys.exit(main())
