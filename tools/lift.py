"""The xla lane's ranks, all in one process or as processes, against the cpu lane's: docs/results/xla_lift.md.

    python tools/lift.py                      # 10 minutes of two cores
    python tools/lift.py --rows gpt-tp2       # some of it; prints only

Exit code 1 when a step's loss or a rank's gradient norm is off, a step after the first ones compiles, or an operation
falls off XLA.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.testing.lifted import Lifted, lifted_env
from nxdt_nemo.testing.matrix import recipe_of
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.parity import Parity, relative, traced_errors
from nxdt_nemo.testing.pool import RankPool
from nxdt_nemo.testing.recipe import Family, Layout, Recipe, layout
from nxdt_nemo.testing.traced import TRACED_ENV, Traced

RESULT = Path(__file__).parents[1] / "docs" / "results" / "xla_lift.md"
STEPS = 4
TOLERANCE = 1e-6
WARM_UP = 2  # steps of processes: the second is the first that has the optimizer's state of a step before
SHARED = "loss", "grad norm", "tolerance", "graphs of each step", "off XLA", "s", "verdict"
COLUMNS = "model", "layout", "ranks", "beside", *SHARED
OF_PROCESSES = "model", "layout", "ranks", *SHARED


@dataclass(frozen=True)
class Row:
    """A layout; beside the same on the cpu lane, or one rank where there is no room for it."""

    family: Family
    place: str
    layers: int = 2
    tolerance: float = TOLERANCE
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


@dataclass(frozen=True)
class Processes:
    """A layout, each rank a process, beside the same on the cpu lane; further fields of the TransformerConfig."""

    family: Family
    place: str
    mark: str = ""
    fields: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As --rows has it."""
        return f"{self.family}-{self.place}{self.mark}"


PROCESSES = (
    Processes("bert", "one"),
    Processes("mixtral", "one", "+capacity", {"moe_expert_capacity_factor": 0.5}),
    Processes("gpt", "pp2"),
    Processes("gpt", "pp2vpp2"),
    Processes("gpt", "tp2pp2"),
    Processes("mixtral", "ep2dp2"),
    Processes("llama", "cp2"),
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
    off = sum(fallen(step) for step in found.within)
    good = max(loss, norm) <= row.tolerance and not any(found.compiled[1:]) and not off
    cells = [row.family, row.place, str(place.world), str(beside), f"{loss:.1e}", f"{norm:.1e}", f"{row.tolerance:.0e}"]
    compiled = " ".join(map(str, found.compiled))
    return Line([*cells, compiled, str(off), f"{seconds:.0f}", "green" if good else "RED"], good)


def line_of_processes(row: Processes, parity: Parity) -> Line:
    """Run it on both lanes."""
    recipe, place = recipe_of(row.family, row.place)
    weights = parity.weights(recipe)
    began = time.monotonic()
    with RankPool(place.world, env=TRACED_ENV, init=ACTIVE, group=False, timeout=3600) as pool:
        arguments = (recipe, weights, place, STEPS, "", None, None, row.fields)
        parts: list[Traced] = pool.run("nxdt_nemo.testing.traced:train", *arguments)
    seconds = time.monotonic() - began
    loss, norm = traced_errors(parts, parity.ours(recipe, place, **row.fields)[0])
    steps = [part.steps for part in parts]
    compiled = [max(step.get("compiled", 0) for step in at_once) for at_once in zip(*steps, strict=True)]
    off = sum(fallen(step) for part in parts for step in part.steps)
    good = max(loss, norm) <= TOLERANCE and not any(compiled[WARM_UP:]) and not off
    cells = [row.family, f"{row.place}{row.mark}", str(place.world), f"{loss:.1e}", f"{norm:.1e}", f"{TOLERANCE:.0e}"]
    verdict = "green" if good else "RED"
    return Line([*cells, " ".join(map(str, compiled)), str(off), f"{seconds:.0f}", verdict], good)


def fallen(counted: Mapping[str, int]) -> int:
    """Operations that fell off XLA, of what runtime/xla/metrics.py counts."""
    return sum(number for name, number in counted.items() if name.startswith("aten::"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"some of: {', '.join(row.name for row in (*ROWS, *PROCESSES))}")
    asked = parser.parse_args(arguments).rows
    if unknown := {*asked.split(",")} - {row.name for row in (*ROWS, *PROCESSES)} if asked else ():
        parser.error(f"--rows: there is no {', '.join(sorted(unknown))}")
    lifted, processes = Sheet("all ranks in one process", COLUMNS), Sheet("each rank a process", OF_PROCESSES)
    with Parity(timeout=3600) as parity:
        for row in (*ROWS, *PROCESSES):
            if asked is None or row.name in asked.split(","):
                print(f"{row.name} ...", file=sys.stderr, flush=True)
                if isinstance(row, Row):
                    lifted.lines.append(line(row, parity))
                else:
                    processes.lines.append(line_of_processes(row, parity))
    show([lifted, processes], Console())
    if asked is None:
        RESULT.write_text(page(lifted, processes))
    return 0 if lifted.good and processes.good else 1


def page(lifted: Sheet, processes: Sheet) -> str:
    """The tables, and how to read them."""
    return f"""\
# The xla lane's ranks, beside the cpu lane's

{heading("python tools/lift.py").replace("cpu lane", f"xla lane on XLA:CPU, torch-xla {version('torch-xla')}")}
{STEPS} steps in float32 with the same weights and batches on both lanes. "loss" and "grad norm" are the largest
relative difference of a step, of the norm on any rank; "graphs of each step" those that it compiles; "off XLA"
operations that the host computes.

## All ranks in one process

One program, traced once, on as many devices of XLA:CPU as there are ranks, with its collectives inside the graph
(nxdt_nemo/runtime/xla/lift.py), beside the cpu lane's processes.

{lifted.markdown}

## Each rank a process

One rank, whose step is one graph; and more, whose graphs are cut where ranks talk, with host copies over gloo. A
step's graphs are those of the rank that compiles most. "+capacity": experts that take half of an even share of tokens,
and drop the rest, the same ones on both lanes.

{processes.markdown}
"""


if __name__ == "__main__":
    sys.exit(main())
