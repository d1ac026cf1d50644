"""The neuron lane in a table: its stand-in against the cpu lane, and the cpu lane on this torch against upstream.

    python tools/neuron.py                  # everything, 8 minutes; writes docs/results/neuron_torchN.M.md
    python tools/neuron.py --only gpt-tp2   # one row of the stand-in; prints only

Run it once with each lock: `requirements.lock` has torch 2.9, `requirements-neuron.lock` the torch of TorchNeuron.
Rows are those of tools/parity.py: loss and gradient norm of every step, each parameter's gradient of step 1. Exit
code 1 when a row is not as it must be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from parity_lib.sheet import PARITY_COLUMNS, Sheet, heading, parity_line, show
from rich.console import Console

from nxdt_nemo.testing.matrix import NEURON
from nxdt_nemo.testing.parity import Parity, Row
from nxdt_nemo.testing.recipe import FAMILIES, Recipe, layout

PARITY = 1e-6
TORCH = ".".join(version("torch").split(".")[:2])
RESULT = Path(__file__).parents[1] / "docs" / "results" / f"neuron_torch{TORCH}.md"


def cpu_rows(parity: Parity) -> Iterator[Row]:
    """What the second lock changes for the cpu lane: nothing."""
    for family in FAMILIES:
        recipe = Recipe.of(family, layers=2, steps=10)
        yield parity.against_stock(recipe, PARITY)
        yield parity.against_one_rank(recipe, layout("tp2sp"), PARITY)


def neuron_rows(parity: Parity, only: str = "") -> Iterator[Row]:
    """The stand-in against the cpu lane in the same layout, and one mistake."""
    for family, place, fault in NEURON:
        if only in ("", f"{family}-{place}"):
            yield parity.neuron_row(family, place, fault)


def main() -> int:
    """Print the tables, and write the page when nothing was left out."""
    parser = argparse.ArgumentParser(description="The neuron lane's stand-in against the cpu lane.")
    parser.add_argument("--only", default="", help="FAMILY-LAYOUT, as gpt-tp2")
    only = parser.parse_args().only
    if only and only not in (names := [f"{family}-{place}" for family, place, _ in NEURON]):
        parser.error(f"--only {only}: there are {', '.join(names)}")
    console = Console()
    cpu = Sheet(f"the cpu lane on torch {TORCH}, relative errors", PARITY_COLUMNS)
    neuron = Sheet("the neuron lane's stand-in against the cpu lane, relative errors", PARITY_COLUMNS)
    with Parity(timeout=900) as parity:
        parts = (
            [(neuron, neuron_rows(parity, only))] if only else [(cpu, cpu_rows(parity)), (neuron, neuron_rows(parity))]
        )
        for sheet, rows in parts:
            for row in rows:
                sheet.lines.append(parity_line(row))
                console.print(f"{row.family}: {row.left}, worst error {row.errors.worst:.1e}", highlight=False)
    show([cpu, neuron], console)
    good = cpu.good and neuron.good
    if good and not only:
        RESULT.write_text(page(cpu, neuron))
        console.print(f"written: {RESULT.relative_to(RESULT.parents[2])}", highlight=False)
    return 0 if good else 1


def page(cpu: Sheet, neuron: Sheet) -> str:
    """docs/results/neuron_torchN.M.md."""
    return f"""# The neuron lane on its stand-in, torch {TORCH}

{heading("python tools/neuron.py")}
The stand-in is a device on the host's memory (docs/neuron.md): no Trainium was involved. 10 steps of a 2-layer model;
what an error is: parity.md.

## The cpu lane on this torch

{cpu.markdown}

## The stand-in against the cpu lane

{neuron.markdown}
"""


if __name__ == "__main__":
    sys.exit(main())
