"""The parity tables: stock megatron-core against us, our layouts against one rank, and mistakes that must show.

    python tools/parity.py                                  # everything, 15 minutes; writes docs/results/parity.md
    python tools/parity.py --model gpt --layouts tp2sp,pp2  # some of it; prints only
    python tools/parity.py --level megatron                 # without NeMo, 3 minutes; prints only

A row compares the loss and the grad norm of every step and each parameter's gradient of step 1; its error is the worst
of them. Exit code 1 when a row is not as it must be. Uses nxdt_nemo.testing and the cpu lane only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from parity_lib.sheet import PARITY_COLUMNS, Sheet, heading, parity_line, show
from rich.console import Console

from nxdt_nemo.testing.parity import Parity, Row
from nxdt_nemo.testing.recipe import FAMILIES, Family, Recipe, layout

UPSTREAM = 1e-6
ONE_RANK = {"gpt": 1e-6, "llama": 1e-5}
LAYOUTS = "tp2,tp2sp,pp2,tp2pp2,tp2sppp2,dp2"
RESULT = Path(__file__).parents[1] / "docs" / "results" / "parity.md"


def megatron_rows(parity: Parity, family: Family, layouts: list[str], steps: int) -> Iterator[Row]:
    """Upstream first, then the layouts, then the negative controls."""
    recipe, tolerance = Recipe.of(family, steps=steps), ONE_RANK[family]
    yield parity.against_stock(recipe, UPSTREAM)
    for name in layouts:
        yield parity.against_one_rank(recipe, layout(name), tolerance)
    yield parity.against_one_rank(recipe, layout("tp2sp"), tolerance, "norm gradients not reduced")
    yield parity.against_one_rank(recipe, layout("tp2"), tolerance, "one gradient x 1.01")


def nemo_rows(parity: Parity, family: Family, layouts: list[str], steps: int) -> Iterator[Row]:
    """The same through all of NeMo, and in bf16 (megatron_amp_O2) against the dtype's own error."""
    recipe, tolerance = Recipe.of(family, steps=steps), ONE_RANK[family]
    yield parity.nemo_against_stock(recipe, UPSTREAM)
    for name in layouts:
        yield parity.nemo_against_one_rank(recipe, layout(name), tolerance)
    half = Recipe.of(family, steps=steps, dtype="bfloat16")
    limits = parity.order_noise(half).times(2)
    for name in layouts:
        yield parity.nemo_against_one_rank(half, layout(name), limits)
    yield parity.nemo_against_one_rank(half, layout("dp2"), limits, model__grad_div_ar_fusion=True)


LEVELS = {"megatron": megatron_rows, "nemo": nemo_rows}


def markdown(found: Sheet, command: str, steps: int) -> str:
    """The file in docs/results."""
    return f"""# Parity

{heading(command)}

{steps} steps in float32 of a 4-layer model, hidden size 64, 4 micro-batches of 2 x 32 tokens a step, learning rate
2e-3 (Llama 1e-3) with 2 warm-up steps and cosine decay, dropout 0, clipping at 1.0, the same weights and batches on
both sides.
Every error is relative: the worst step's loss and grad norm, and max |difference| / largest element over each
parameter's gradient of step 1 (before clipping, put together from all ranks); "copies" is the largest difference
between two ranks' copies of a gradient. A row is green when all four are within the tolerance.

{found.markdown}

bf16 rows have a limit for each kind (loss, grad norm, gradient): twice what changes on one rank when each product
with a weight is added up as two halves, each rounded to bf16, which is as valid an order as the usual one.

"megatron-core" is the stock package on one rank, with three functions of torch.cuda stubbed, trained by torch's own
autograd loop and AdamW; its grad norm is summed in float64. "NeMo" is MegatronGPTModel under trainer.fit with data from
.bin/.idx and fused_adam; its batches and learning rates were recorded and replayed on the stock side. Rows with a
mistake are negative controls: the error was
put in on purpose, and a table that stayed green would prove nothing.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=FAMILIES, action="append", help="default: both")
    parser.add_argument("--layouts", default=LAYOUTS, help=f"default: {LAYOUTS}")
    parser.add_argument("--level", choices=LEVELS, action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name} for a partial run too")
    args = parser.parse_args()
    names = args.layouts.split(",")
    for name in names:
        try:
            layout(name)
        except ValueError as error:
            parser.error(str(error))
    console, found = Console(), Sheet(f"parity, {args.steps} steps, relative errors", PARITY_COLUMNS)
    with Parity() as parity, console.status("starting ranks") as status:
        for level, family in product(args.level or LEVELS, args.model or FAMILIES):
            for row in LEVELS[level](parity, family, names, args.steps):
                found.lines.append(parity_line(row))
                status.update(f"{row.family}: {row.left}, worst error {row.errors.worst:.1e}")
    show([found], console)
    if len(sys.argv) == 1 or args.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(markdown(found, " ".join(["python tools/parity.py", *sys.argv[1:]]), args.steps))
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
