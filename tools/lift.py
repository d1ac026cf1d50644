"""All ranks of a layout in one process on the xla lane, against the cpu lane's ranks: docs/results/xla_lift.md.

    python tools/lift.py                      # 10 minutes of two cores
    python tools/lift.py --rows gpt-tp2       # some of it; prints only

Exit code 1 when a step's loss or a rank's gradient norm is off, or a step after the first compiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.testing.lifted import Lifted, lifted_env
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.parity import Parity, relative
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Family, Layout, Recipe, layout

RESULT = Path(__file__).parents[1] / "docs" / "results" / "xla_lift.md"
STEPS = 4
COLUMNS = (
    "model",
    "layout",
    "ranks",
    "beside",
    "loss",
    "grad norm",
    "tolerance",
    "graphs of each step",
    "s",
    "verdict",
)


@dataclass(frozen=True)
class Row:
    """A layout; beside the same on the cpu lane, or one rank where there is no room for it."""

    family: Family
    place: str
    layers: int = 2
    tolerance: float = 1e-6
    alone: bool = False

    @property
    def name(self) -> str:
        """As --rows has it."""
        return f"{self.family}-{self.place}"


ROWS = (
    Row("gpt", "tp2"),
    Row("llama", "tp2sp"),
    Row("gpt", "tp4dp2"),
    Row("gpt", "dp4+zero"),
    Row("llama", "tp2spdp2+zero"),
    Row("gpt", "tp8spdp4+zero", layers=1, tolerance=1e-5, alone=True),
)


def line(row: Row, parity: Parity) -> Line:
    """Run it on both lanes."""
    recipe, place = Recipe.of(row.family, layers=row.layers), layout(row.place)
    weights = parity.weights(recipe)
    began = time.monotonic()
    with RankPool(1, env=lifted_env(place), init=ACTIVE, group=False, timeout=3600) as pool:
        found: Lifted = pool.run("nxdt_nemo.testing.lifted:train", recipe, weights, place, STEPS)[0]
    seconds = time.monotonic() - began
    beside = Layout() if row.alone else place
    expected, _ = parity.ours(recipe, beside)
    loss = relative([sum(step) / len(step) for step in found.losses], expected.losses[:STEPS])
    norm = max(relative([*norms], expected.grad_norms[:STEPS]) for norms in zip(*found.grad_norms, strict=True))
    good = loss <= row.tolerance and norm <= row.tolerance and not any(found.compiled[1:])
    cells = [row.family, row.place, str(place.world), str(beside), f"{loss:.1e}", f"{norm:.1e}", f"{row.tolerance:.0e}"]
    compiled = " ".join(map(str, found.compiled))
    return Line([*cells, compiled, f"{seconds:.0f}", "green" if good else "RED"], good)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"some of: {', '.join(row.name for row in ROWS)}")
    asked = parser.parse_args(arguments).rows
    sheet, parity = Sheet("all ranks in one process", COLUMNS), Parity(timeout=3600)
    for row in ROWS:
        if asked is None or row.name in asked.split(","):
            print(f"{row.name} ...", file=sys.stderr, flush=True)
            sheet.lines.append(line(row, parity))
    show([sheet], Console())
    if asked is None:
        RESULT.write_text(page(sheet))
    return 0 if sheet.good else 1


def page(sheet: Sheet) -> str:
    """The table, and how to read it."""
    return f"""\
# All ranks in one process

{heading("python tools/lift.py").replace("cpu lane", f"xla lane on XLA:CPU, torch-xla {version('torch-xla')}")}
One program, traced once, on as many devices of XLA:CPU as there are ranks, with its collectives inside the graph
(nxdt_nemo/runtime/xla/lift.py), beside the cpu lane's processes with the same weights and batches; {STEPS} steps in
float32. "loss" and "grad norm" are the largest relative difference of a step, of the norm on any rank.

{sheet.markdown}
"""


if __name__ == "__main__":
    sys.exit(main())
