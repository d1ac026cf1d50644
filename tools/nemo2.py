"""NeMo 2.0 on the cpu lane: layouts against one rank, NeMo's own training scripts, recipes and the command line.

    python tools/nemo2.py CHECKOUT                  # of NeMo v2.4.0; writes docs/results/nemo2.md
    python tools/nemo2.py CHECKOUT --rows tune-lora,bert
    python tools/nemo2.py CHECKOUT --folder FOLDER --rows bert  # in several sittings: the page names what is missing

A script makes its first steps on one rank and saves; each layout goes on from that checkpoint, and is compared with one
rank that does. Scripts of tools/nemo2_lib run in float32 and write full digits; those of the checkout (its folder
tests/collections/llm) say bfloat16 themselves and print four. Exit code 1 when a row is off, or the mistake that some
rows make on purpose is not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nemo2_lib.families import FAMILIES, JOBS, Family, Job, Layout
from nemo2_lib.inputs import Inputs, make
from nemo2_lib.runs import Runs
from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console

from nxdt_nemo.testing.parity import relative

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "nemo2.md"
LAYOUTS = ("row", "script", "layout", "ranks", "arguments", "steps", "loss", "tolerance", "s", "verdict")
SINGLE = ("row", "script", "ranks", "arguments", "fixed size", "losses", "s", "verdict")
TRIP = "import-export"
VOCABULARY = "dummy_tokenizer.model"


def lines_of(family: Family, runs: Runs) -> list[Line]:
    """A line for each of its layouts."""
    folder = runs.folder / family.key
    runs.start(family.script, f"{family.words} {family.first}", folder)
    base = folder.replace(folder.with_name(f"{family.key}-saved"))
    one = runs.start(family.script, f"{family.words} {family.then}", runs.copy(base, folder))
    found = [line(family, layout, runs, base, one.losses) for layout in family.layouts]
    shutil.rmtree(base)
    return found


def line(family: Family, layout: Layout, runs: Runs, base: Path, one: Sequence[float]) -> Line:
    """Go on from what one rank has saved, where it did: elsewhere Lightning forgets which files are its own."""
    words = f"{family.then} {layout.words}".strip()
    folder = runs.copy(base, runs.folder / family.key)
    found = runs.start(family.script, f"{family.words} {words}", folder, family.ends)
    loss = relative(found.losses, one)
    equal = loss <= family.tolerance
    good = (math.isfinite(loss) and not equal) if layout.mistake else equal
    verdict = ("seen" if good else "NOT SEEN") if layout.mistake else ("green" if good else "RED")
    cells = [family.key, family.script, layout.name, str(layout.ranks), f"`{layout.words}`", str(len(found.losses))]
    cells += [f"{loss:.1e}", f"{family.tolerance:.0e}", f"{found.seconds:.0f}", verdict]
    return Line(cells, good)


def job_lines(job: Job, runs: Runs) -> list[Line]:
    """A run that has to end well, with numbers."""
    found = runs.start(job.script, job.words, runs.folder / job.key, job.ends)
    good = bool(found.losses) and all(math.isfinite(loss) for loss in found.losses)
    losses = ", ".join(f"{loss:.4g}" for loss in found.losses)
    cells = [job.key, job.script, str(job.ranks), f"`{job.words}`", job.fixed, losses, f"{found.seconds:.0f}"]
    verdict = ("trains, its last check fails" if found.code else "green") if good else "RED"
    return [Line([*cells, verdict], good)]


def trip(runs: Runs) -> Line:
    """Hugging Face's format to NeMo's and back: the same bits."""
    import torch
    from safetensors.torch import load_file

    folder = runs.folder / TRIP
    done = runs.start("convert.py", "export {inputs}/imported {folder}/back", folder)
    one, other = (load_file(path / "model.safetensors") for path in (runs.inputs.folder / "hf", folder / "back"))
    equal = one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
    cells = [TRIP, "convert.py", "1", "`export`, of what `import` made", "", f"{len(one)} tensors"]
    return Line([*cells, f"{done.seconds:.0f}", "the same bits" if equal else "RED"], equal)


def import_model(runs: Runs, name: str) -> None:
    """What tuning starts from: inputs/imported..., of inputs/hf..."""
    folder, where = runs.inputs.folder, f"{{inputs}}/hf{name} {{inputs}}/imported{name}"
    runs.start("convert.py", f"import {where}", runs.folder / f"import{name}")
    shutil.copy(folder / "corpus" / "tokenizer.model", folder / f"imported{name}" / VOCABULARY)


def work(runs: Runs) -> dict[str, Callable[[], list[Line]]]:
    """What makes each row's lines, by its name."""
    return {
        **{family.key: partial(lines_of, family, runs) for family in FAMILIES},
        TRIP: lambda: [trip(runs)],
        **{job.key: partial(job_lines, job, runs) for job in JOBS},
    }


def kept(path: Path, make_lines: Callable[[], list[Line]]) -> list[Line]:
    """Lines of a call before this one, or new ones, which are kept if they are good."""
    if path.exists():
        return [Line(cells, True) for cells in json.loads(path.read_text())]
    lines = make_lines()
    if all(line.good for line in lines):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([line.cells for line in lines]))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    names = [*(family.key for family in FAMILIES), TRIP, *(job.key for job in JOBS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of NeMo v2.4.0: the folder with tests/collections/llm")
    parser.add_argument("--rows", help=f"some of: {', '.join(names)}")
    parser.add_argument("--folder", type=Path, help="keeps inputs and rows: those there are not run again")
    asked = parser.parse_args(arguments)
    if not (asked.checkout / "tests" / "collections" / "llm").is_dir():
        parser.error(f"{asked.checkout} has no tests/collections/llm")
    wanted = set(names if asked.rows is None else asked.rows.split(","))
    if unknown := wanted - set(names):
        parser.error(f"no rows of this name: {', '.join(sorted(unknown))}")
    layouts, single = Sheet("layouts against one rank", LAYOUTS), Sheet("single runs", SINGLE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.folder or Path(temporary)).resolve()
        runs = prepared(folder, asked.checkout.resolve())
        wanted |= {path.stem for path in (folder / "rows").glob("*.json")} & set(names)
        for name, make_lines in work(runs).items():
            if name in wanted:
                print(f"{name} ...", file=sys.stderr, flush=True)
                sheet = layouts if name in {family.key for family in FAMILIES} else single
                try:
                    sheet.lines += kept(folder / "rows" / f"{name}.json", make_lines)
                except (RuntimeError, subprocess.SubprocessError) as error:
                    print(error, file=sys.stderr)
                    sheet.lines.append(Line([name, *[""] * (len(sheet.columns) - 2), "DID NOT END"], False))
    show([layouts, single], Console())
    if asked.rows is None or asked.folder is not None:
        RESULT.write_text(page(layouts, single, [name for name in names if name not in wanted]))
    return 0 if layouts.good and single.good else 1


def prepared(folder: Path, checkout: Path) -> Runs:
    """Runs in this folder, with inputs that are made if they are not there."""
    runs = Runs(Inputs(folder / "inputs"), checkout, folder / "runs")
    shutil.rmtree(runs.folder, ignore_errors=True)
    if not (folder / "inputs" / "imported_fixed" / VOCABULARY).exists():
        shutil.rmtree(folder / "inputs", ignore_errors=True)
        make(folder / "inputs", checkout)
        for name in ("", "_fixed"):
            import_model(runs, name)
    return runs


def page(layouts: Sheet, single: Sheet, missing: Sequence[str]) -> str:
    """The tables, how to read them, and what was not run."""
    rest = f"\nNot in this table yet: {', '.join(f'`{name}`' for name in missing)}.\n" if missing else ""
    return f"""\
# NeMo 2.0

{heading("python tools/nemo2.py CHECKOUT [--folder FOLDER --rows ROWS]")}
Several sittings with one FOLDER make one page.
Scripts named *pretraining*, *tuning*, *convert* and *recipe* are in tools/nemo2_lib, written for GPUs; all others are
NeMo's own (tests/collections/llm of v2.4.0) and unedited. Layouts go on from a checkpoint of one rank: "loss" is the
largest relative difference to one rank that does, of `steps` steps. Our scripts run in float32; NeMo's in bfloat16,
and print four digits. {{inputs}} are made by tools/nemo2_lib/inputs.py: nothing is downloaded. The script of `recipe`
counts the files of all checkpoints in its folder at its end: right on one rank, and not for a checkpoint that other
layouts go on from, which has one rank's files.

{layouts.markdown}

Runs whose losses are drawn anew in each layout, or that have one only. "fixed size" is written in the script and was
not changed; by `smaller.py` run scripts whose steps take hours at their size: text untouched, other numbers for the
sizes that they construct models and data with. `mixtral` ends with a check of the checkpoint that it wrote, and stops
at the first tensor of the optimizer: ours have the shapes of their parameters, upstream's are flat. NeMo 2.0 asks for
the flat ones (`fully_sharded_model_space`) in every run, and we do not write them: their shapes are another layout's
in another layout, and `nxdt-nemo ckpt` and our unsharded optimizers, which take the parameters' shapes, would lose
every checkpoint of NeMo 2.0 ([checkpoints.md](../checkpoints.md)).

{single.markdown}
{rest}"""


if __name__ == "__main__":
    sys.exit(main())
