"""A resumed run is the run that was never stopped: at every boundary of an epoch, and after kills at random moments.

    python tools/resume.py                           # 35 minutes; writes docs/results/resume.md and kills.md
    python tools/resume.py --parts kills             # 10 minutes; writes kills.md
    python tools/resume.py --layouts DP=2 --kills 4  # some of it; prints only

Real jobs through the command line, on the cpu lane, in fp32 with stock dropout. Compared to the bit: what each rank
reads, loss, grad norm, learning rate and consumed samples of every later step, validation losses, and every tensor of
the last checkpoint, weights and optimizer state. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from parity_lib.sheet import Line, Sheet, heading, show
from resume_lib.boundaries import BOUNDARIES, EPOCH, LAYOUTS, OPTIMIZERS, STEPS, rows
from resume_lib.kills import kills
from rich.console import Console

from nxdt_nemo.testing.script_run import write_corpus

RESULTS = Path(__file__).parents[1] / "docs" / "results"
KILLED = (("one rank", "fused_adam"), ("DP=2", "distributed_fused_adam"))
SEED = 20


def boundaries(layouts: list[str], optimizers: list[str], corpus: Path, folder: Path) -> Sheet:
    """One line a layout and optimizer."""
    sheet = Sheet("resumed at a boundary, against the run that went through", ("layout", "optimizer", *BOUNDARIES))
    for row in rows(layouts, optimizers, corpus, folder):
        sheet.lines.append(
            Line([row.layout, row.optimizer, *(row.differs[t] or "equal" for t in BOUNDARIES)], row.good)
        )
        print(*sheet.lines[-1].cells, sep=", ", flush=True)
    return sheet


def killed(number: int, aimed: int, corpus: Path, folder: Path) -> Sheet:
    """One line a kill; half of them in each of KILLED."""
    columns = ("layout", "after step", "in a save", "newest complete checkpoint", "resumed from", "every step")
    sheet = Sheet("killed", columns)
    for index, (layout, optimizer) in enumerate(KILLED):
        shares = (count * (index + 1) // len(KILLED) - count * index // len(KILLED) for count in (number, aimed))
        for kill in kills(layout, optimizer, *shares, corpus, folder / f"kills_{index}", SEED + index):
            told = (kill.newest or "none", kill.resumed or "none", kill.broken or "equal")
            sheet.lines.append(Line([layout, str(kill.step), "yes" if kill.writing else "no", *told], kill.good))
    return sheet


def resumed_page(command: str, sheet: Sheet) -> str:
    """docs/results/resume.md."""
    return f"""# A resumed run is the run that was never stopped

{heading(command)}

NeMo's calls (`MegatronTrainerBuilder`, `exp_manager`, `trainer.fit`) on real `.bin/.idx` data, fp32, hidden and
attention dropout 0.1, {STEPS} steps in epochs of {EPOCH}, validated every second step. One run goes through and saves;
others start from each of these checkpoints. "equal" means to the bit, on each rank, for every later step: the tokens
read, loss, grad norm, learning rate, consumed samples; the validation losses; every tensor of the last checkpoint,
optimizer state included.

{sheet.markdown}

"in a validation": saved where NeMo's callback saves after one (step 2). "mid-epoch" (step 3), "at its end" (step 4) and
"after it" (step 5): saved in the hook at a step's end, as `every_n_train_steps`, a time limit or a preemption do.
What a kill leaves, and what the next start takes: [kills.md](kills.md).
"""


def killed_page(command: str, sheet: Sheet, number: int, aimed: int) -> str:
    """docs/results/kills.md."""
    return f"""# A job that is killed goes on from its newest complete checkpoint

{heading(command)}

The job of resume.md saves after every second step, keeps the three best checkpoints and removes others. SIGKILL to all
its processes, and the same command again in the same folder: {number} times at a random moment in the 4 s after its
first step, then {aimed} times at a random moment in the 0.3 s after a save began, half of each in each layout (seed
{SEED}). After each kill, every checkpoint that stands under its own name was read whole. "every step" compares each
step ever done with those of a job that was left alone.

{sheet.markdown}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--aimed", type=int, default=10, help="more, in a save")
    parser.add_argument("--parts", default="boundaries,kills")
    args = parser.parse_args()
    layouts, optimizers = args.layouts.split(","), args.optimizers.split(",")
    for names, known in ((layouts, LAYOUTS), (optimizers, OPTIMIZERS)):
        for name in names:
            if name not in known:
                parser.error(f"{name} is none of {', '.join(known)}")
    whole = args == parser.parse_args(["--parts", args.parts])  # a part is written when all of it was done
    command, found = " ".join(["python tools/resume.py", *sys.argv[1:]]), []
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name) / "corpus")
        if "boundaries" in args.parts:
            found.append(boundaries(layouts, optimizers, corpus, Path(name)))
            if whole:
                (RESULTS / "resume.md").write_text(resumed_page(command, found[-1]))
        if "kills" in args.parts:
            found.append(killed(args.kills, args.aimed, corpus, Path(name)))
            if whole:
                (RESULTS / "kills.md").write_text(killed_page(command, found[-1], args.kills, args.aimed))
    show(found, Console())
    return 0 if all(sheet.good for sheet in found) else 1


if __name__ == "__main__":
    sys.exit(main())
