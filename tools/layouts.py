"""Every family in every layout against one rank, and a mistake for each kind of reduction: the matrix.

    python tools/layouts.py                              # everything; writes docs/results/layouts.md
    python tools/layouts.py --level megatron             # without NeMo; prints only
    python tools/layouts.py --model gpt --layouts pp2vpp2,tp2sp   # some of it; prints only

A row compares the loss and the grad norm of every step and each parameter's gradient of step 1, as tools/parity.py
does. Exit code 1 when a row is not as it must be. Uses nxdt_nemo.testing and the cpu lane only; at most 8 ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from parity_lib.sheet import PARITY_COLUMNS, Sheet, heading, parity_line, show
from rich.console import Console

from nxdt_nemo.testing.matrix import LAYOUTS, MISTAKES, NEMO, TOLERANCE, recipe_of
from nxdt_nemo.testing.parity import Parity, Row
from nxdt_nemo.testing.recipe import Family, Recipe

UPSTREAM = 1e-6
RESULT = Path(__file__).parents[1] / "docs" / "results" / "layouts.md"


def rows(parity: Parity, family: Family, names: list[str], steps: int) -> Iterator[Row]:
    """One rank against upstream, layouts against one rank, mistakes. By world size, so that ranks are started once."""
    yield parity.against_stock(Recipe.of(family, steps=steps), UPSTREAM)
    for name in sorted(names, key=lambda name: recipe_of(family, name)[1].world):
        yield parity.against_one_rank(*recipe_of(family, name, steps), TOLERANCE)
    for _, name, fault in (case for case in MISTAKES if case[0] == family):
        yield parity.against_one_rank(*recipe_of(family, name, steps), TOLERANCE, fault)


def all_rows(parity: Parity, levels: list[str], args: argparse.Namespace) -> Iterator[Row]:
    """What was asked for."""
    for family in (args.model or LAYOUTS) if "megatron" in levels else ():
        names = args.layouts.split(",") if args.layouts else LAYOUTS[family].split()
        yield from rows(parity, family, names, args.steps)
    for row in NEMO if "nemo" in levels else ():
        yield parity.nemo_row(row)


def markdown(found: Sheet, command: str, steps: int) -> str:
    """The file in docs/results."""
    return f"""# Layouts

{heading(command)}
Plain megatron-core loops. The models, the data and what an error is are those of parity.md: {steps} steps in float32 of
4 layers (more where the stages need them), hidden size 64, learning rate 2e-3 (Llama, Mixtral and BERT 1e-3), clipping
at 1.0, dropout 0. Mixtral: 4 experts, the best two of each token, none dropped, both auxiliary losses. BERT and T5:
padded sequences; a T5's pipeline ranks are half its encoder's, half its decoder's. `vpp` model chunks a pipeline rank,
`first1`, `last1` one layer in that stage, `cut1-3` layers of each stage (pipeline_model_parallel_layout), `account`
embedding and loss count as a layer, `etp` the tensor parallel size of experts, `+zero` ZeRO-1, `+grouped` all experts
of a rank in two parameters, `+static` experts in fixed shapes; the reference is always one rank with the unsharded
optimizer.

"NeMo" is MegatronGPTModel under trainer.fit, from YAML. It takes interleaved pipelines and experts with
megatron_amp_O2 in bf16 only; such rows have a limit for each kind (loss, grad norm, gradient): twice what changes on
one rank when each product with a weight is added up as two halves, each rounded to bf16. tp4 is a Llama with 2 KV
heads, which has copies of them.

{found.markdown}

"megatron-core" is the stock package on one rank, trained by torch's own autograd loop and AdamW. Rows with a mistake
are negative controls: the error was put in on purpose, and a table that stayed green would prove nothing.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=get_args(Family), action="append", help="default: all")
    parser.add_argument("--layouts", default="", help="comma separated; default: the whole matrix")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--level", choices=("megatron", "nemo"), action="append", help="default: both")
    args = parser.parse_args()
    levels = args.level or (["megatron"] if args.layouts or args.model else ["megatron", "nemo"])
    console, found = Console(), Sheet(f"layouts, {args.steps} steps, relative errors", PARITY_COLUMNS)
    with Parity() as parity, console.status("starting ranks") as status:
        for row in all_rows(parity, levels, args):
            found.lines.append(parity_line(row))
            done = f"{row.family}: {row.left}, worst error {row.errors.worst:.1e}, {row.verdict}"
            status.update(done) if console.is_terminal else console.print(done)
    show([found], console)
    if len(sys.argv) == 1:
        RESULT.write_text(markdown(found, "python tools/layouts.py", args.steps))
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
