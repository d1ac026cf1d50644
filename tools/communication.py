"""Bytes that a step sends, by process group and collective, against the least that its layout has to send.

    python tools/communication.py                                  # all; writes docs/results/communication.md
    python tools/communication.py --model gpt --layouts tp2,pp2    # some; prints only

A line is one collective in one kind of group, of all ranks together, in the second step of a tiny model; what is
counted and what the least is: docs/communication.md. Exit code 1 when a line has bytes that nothing explains, or too
few. Uses nxdt_nemo.testing and the cpu lane only; at most 8 ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.testing.communication import LIMIT, CommunicationRow, Counted, job_of, rows
from nxdt_nemo.testing.matrix import LAYOUTS, recipe_of
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Family, Layout, Recipe

RESULT = Path(__file__).parents[1] / "docs" / "results" / "communication.md"
COLUMNS = ("model", "layout", "group", "collective", "calls", "bytes", "least", "bytes / least", "verdict", "note")
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    """One layout; fields: further ones of the TransformerConfig."""

    family: Family
    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def job(self) -> tuple[Recipe, Layout]:
        """Its recipe and layout."""
        recipe, place = recipe_of(self.family, self.name)
        return replace(recipe, dtype=self.dtype), place  # type: ignore[arg-type]

    def __str__(self) -> str:
        marks = [str(value) for name, value in self.fields.items() if name in ("cp_comm_type", "recompute_granularity")]
        return ", ".join([self.name, *(f"{mark} recompute" if mark == "full" else mark for mark in marks)]) + (
            ", bf16" if self.dtype == "bfloat16" else ""
        )


OTHERS = (
    Case("gpt", "tp2", FULL),
    Case("llama", "tp2sp", FULL),
    Case("llama", "cp2", {"cp_comm_type": "a2a"}),
    Case("llama", "cp2", {"cp_comm_type": "all_gather"}),
    Case("llama", "cp2", dtype="bfloat16"),
    Case("llama", "tp2spdp2+zero", dtype="bfloat16"),
    Case("mixtral", "tp2sp", FULL),
    Case("mixtral", "tp2sp", dtype="bfloat16"),
    Case("mixtral", "ep2dp2", FULL),
)


def cases(family: Family | None = None, names: str = "") -> list[Case]:
    """The matrix, and the others; or what was asked for."""
    matrix = (Case(one, name) for one in LAYOUTS for name in LAYOUTS[one].split())
    found = [case for case in chain(matrix, OTHERS) if family in (None, case.family)]
    return [case for case in found if not names or case.name in names.split(",")]


def measured(asked: list[Case]) -> Iterator[tuple[Case, list[CommunicationRow]]]:
    """By world size, so that ranks are started once."""
    for world in sorted({case.job[1].world for case in asked}):
        with RankPool(world, env=ACTIVE_ENV, init=ACTIVE, timeout=300.0) as pool:
            for case in (one for one in asked if one.job[1].world == world):
                ranks: list[Counted] = pool.run("nxdt_nemo.testing.communication:counted", *case.job, case.fields)
                yield case, rows(*job_of(*case.job, case.fields), ranks)


def line(case: Case, row: CommunicationRow) -> Line:
    """A row under COLUMNS."""
    note = row.why if row.good else f"expected {row.expected:,}; from {', '.join(row.places) or 'nowhere'}"
    ratio = "" if row.least == 0 else f"{row.ratio:.3f}"
    numbers = [f"{row.calls:,}", f"{row.bytes:,}", f"{row.least:,}", ratio]
    shown = note if row.verdict != "least" else ""
    return Line([case.family, str(case), row.group, row.collective, *numbers, row.verdict, shown], row.good)


def markdown(found: Sheet, command: str) -> str:
    """The file in docs/results."""
    return f"""# Communication

{heading(command)}
Plain megatron-core loops on the models of parity.md: 4 layers (more where the stages need them), hidden size 64, 32
tokens, 4 micro-batches of 2 in all; a T5 has 2 layers a side and a decoder of 16 tokens. All layouts of layouts.md, and
some in bf16, with full recomputation or another context parallelism; on one rank nothing is sent, so that has no line.
A line is one collective in all groups of a kind, of all ranks together, in the second step. Bytes are a call's whole
tensor; "least" is what the layout cannot do without; more than {LIMIT} times that needs a reason. Definitions,
derivations and reasons: [communication.md](../communication.md).

{found.markdown}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=get_args(Family), help="default: all")
    parser.add_argument("--layouts", default="", help="comma separated; default: all")
    args = parser.parse_args()
    console, found = Console(), Sheet("bytes of a step, all ranks", COLUMNS)
    for case, lines in measured(cases(args.model, args.layouts)):
        found.lines += [line(case, row) for row in lines]
        bad = sum(not row.good for row in lines)
        console.print(f"{case.family}: {case}, {len(lines)} lines, {bad or 'none'} unexplained")
    show([found], console)
    if len(sys.argv) == 1:
        RESULT.write_text(markdown(found, "python tools/communication.py"))
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
