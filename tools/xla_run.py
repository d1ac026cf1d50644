"""The stock NeMo script on the xla lane, on XLA:CPU: how many graphs a run compiles, and what the host reads back.

    python tools/xla_run.py                             # half an hour; writes docs/results/xla_run.md
    python tools/xla_run.py --steps 24 --models llama   # some of it; prints only
    python tools/xla_run.py --steps 100 --write         # a shorter one, kept

A tiny GPT and Llama on one rank, in float32 and bf16 with float32 main parameters: steps with validations whose last
batch is not full, logging every tenth, the progress bar and the preemption callback on, a checkpoint at each
validation, and a second process that goes on from the middle. Beside it megatron-core's own modules on the same lane,
for a few steps; and every loss of 30 steps against the cpu lane. Exit code 1 when a run of ours compiles after its
warm-up (2 steps, 2 validations and their saves), has fewer than 2 validations after it, reads a value in training that
neither a logger nor the bar asked for, or more of those than they may, has an operation off XLA, or has another loss.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from parity_lib.sheet import Line, Sheet, heading, show
from rich.console import Console
from xla_run_lib import runs
from xla_run_lib.runs import MODELS, PRECISIONS, WARM, Counted, Job, counted, error_of, losses

from nxdt_nemo.testing.script_run import write_corpus

RESULT = Path(__file__).parents[1] / "docs" / "results" / "xla_run.md"
STEPS, EQUAL_STEPS, STOCK_STEPS = 1000, 30, 12
VALIDATIONS = 4  # of a process
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
COLUMNS = (
    "model", "precision", "layers", "process", "steps, validations", "set-up", "steps'", "validations'", "saves'",
    "end", "after warm-up", "read: logged", "drawn", "unasked", "off XLA", "ms a step",
)  # fmt: skip


def line(job: Job, process: str, found: Counted | None, trouble: str) -> Line:
    """One process; for megatron-core's own modules whatever comes is good."""
    left = [job.model, job.precision, "megatron-core's" if job.stock else "ours", process]
    if found is None or trouble:
        return Line([*left, trouble, *[""] * (len(COLUMNS) - 5)], job.stock)
    lengths = f"{len(found.steps)}, {len(found.validations)}"
    compiled = [found.set_up, *map(by_turn, (found.steps, found.validations, found.saves)), found.end]
    read = [f"{found.logged} of {found.most_logged}", f"{found.drawn} of {found.most_drawn}", found.unasked]
    fallen = ", ".join(f"{number} {name}" for name, number in found.fallen.items()) or "0"
    numbers = [*compiled, found.after_warm_up, *read]
    cells = [*left, lengths, *map(str, numbers), fallen, f"{found.milliseconds:.0f}"]
    return Line(cells, job.stock or found.good)


def by_turn(compiled: list[int]) -> str:
    """Graphs of the first, of the second, and of all others of a kind."""
    return " + ".join(str(sum(of)) for of in (compiled[:1], compiled[1:WARM], compiled[WARM:]))


def compiles(args: argparse.Namespace, corpus: Path, folder: Path) -> Sheet:
    """One line a process: the first half, the half that goes on from it, and megatron-core's own modules."""
    sheet = Sheet("graphs compiled, and tensors read back, by part of the run", COLUMNS)
    half = args.steps // 2
    every = max(1, half // VALIDATIONS)
    for model in args.models:
        for precision in args.precisions:
            jobs = [
                (Job(model, precision, half, every), "from the start", "ours"),
                (Job(model, precision, args.steps, every), "resumed", "ours"),
            ]
            if args.stock:
                jobs.append(
                    (Job(model, precision, STOCK_STEPS, STOCK_STEPS // 2, stock=True), "from the start", "stock")
                )
            for job, process, name in jobs:
                done, found = counted(job, corpus, folder / f"{model}_{precision}_{name}")
                trouble = "" if done.code == 0 else error_of(done)
                if process == "resumed" and not trouble and f"step={half}" not in done.resumed_from:
                    trouble = f"resumed from {done.resumed_from or 'nothing'}"
                sheet.lines.append(line(job, process, found, trouble))
                print(*sheet.lines[-1].cells, sep=", ", flush=True)
    return sheet


def equal(args: argparse.Namespace, corpus: Path, folder: Path) -> Sheet:
    """One line a model: every loss of a run against the cpu lane's."""
    columns = ("model", "precision", "steps", "loss fell by", "loss", "validation loss", "tolerance", "verdict")
    sheet = Sheet("largest relative difference from the cpu lane's losses", columns)
    for model in args.models if args.equal else ():
        for precision in args.precisions:
            job = Job(model, precision, args.equal, args.equal // 3)
            loss, validation, fell = losses(job, corpus, folder / f"{model}_{precision}_equal", print)
            good = max(loss, validation) <= TOLERANCE[precision] and fell > 0.1
            numbers = [f"{fell:.2f}", f"{loss:.1e}", f"{validation:.1e}", f"{TOLERANCE[precision]:.0e}"]
            sheet.lines.append(Line([model, precision, str(args.equal), *numbers, "equal" if good else "NOT"], good))
            print(*sheet.lines[-1].cells, sep=", ", flush=True)
    return sheet


def page(command: str, graphs: Sheet, equals: Sheet) -> str:
    """docs/results/xla_run.md."""
    return f"""# A NeMo run on the xla lane

{heading(command).replace("cpu lane", f"xla lane on XLA:CPU, torch-xla {version('torch-xla')}")}

The stock calls (`MegatronTrainerBuilder`, `exp_manager`, `trainer.fit`) on real `.bin/.idx` data, one rank: a GPT
(LayerNorm, GELU, biases, learned positions, tied embeddings) and a Llama (RMSNorm, SwiGLU, RoPE, grouped queries) of
two layers. bf16 is `precision: bf16` with `megatron_amp_O2`. `validation_drop_last: False` with a last batch that is
not full, logging every {runs.LOG_EVERY} steps, progress bar and preemption callback on, a checkpoint at each of the
validations; "resumed" is a new process that goes on from the middle.

{graphs.markdown}

**Graphs.** "set-up" to "end" are graphs compiled; of steps, validations and saves: by the first + by the second + by
all later ones. The first step makes rotary angles and Lightning's metrics, all others are the second graph. A
validation that keeps its last batch reads each loss (upstream's code): a graph for each piece between two readings, for
each shape of batch; the second finds Lightning's mean as the first left it. A checkpoint's slices are small graphs by
shape. "end", the last save included, is {runs.LAST}: Lightning's metrics start afresh. "after warm-up" is the sum of
the later ones' and must be 0, and at least 2 validations have to come there.

**Read back.** In training steps, with all that follows them up to the next step or validation (the preemption callback
asks there, and the bar). Two may read, a step after the value was computed. A logged step reads {runs.LOG_VALUES}
values: "logged" is at most {runs.LOG_VALUES} for each {runs.LOG_EVERY} steps. A drawing of the bar reads at most
{runs.BAR_VALUES}, and it is drawn once in {runs.BETWEEN_DRAWINGS} s, after each validation and at the last step:
"drawn" is held against the seconds that the steps took, and differs from run to run. The bar's first loss is read at
once. "unasked" is whatever else was read, and must be 0. Validations, saves, set-up and end read as upstream's code
does and are not counted.

**Off XLA.** Operations that fell off in any part of the process, validations and saves too. Not named, as it is a
reading: `{runs.NUMBER}`, a tensor made a number; in training steps it counts as read.

"ms a step" is wall-clock time with all callbacks; the load was {os.getloadavg()[0]:.0f} at the end, on
{os.cpu_count()} cores.

"megatron-core's" is for comparison only: {STOCK_STEPS} steps, one process, and no figure of these lines fails the
run. It keeps the lane and the strategy, and puts upstream's own layers, cross entropy, embedding, gradient norm and
buffers back.

{equals.markdown}

Every step's loss, and every validation's, at a peak learning rate of 2e-3 with two steps of warm-up; a value that
is not finite on either lane is no match.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--equal", type=int, default=EQUAL_STEPS, help="steps compared with the cpu lane's; 0: none")
    parser.add_argument("--stock", action=argparse.BooleanOptionalAction, default=True, help="megatron-core's own too")
    parser.add_argument("--write", action="store_true", help="keep what was chosen as the result")
    for name, known in (("models", MODELS), ("precisions", PRECISIONS)):
        parser.add_argument(f"--{name}", nargs="+", choices=sorted(known), default=sorted(known))
    args = parser.parse_args()
    command = " ".join(["python tools/xla_run.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name) / "corpus")
        equals = equal(args, corpus, Path(name))
        graphs = compiles(args, corpus, Path(name))
    if args.write or args == parser.parse_args([]):
        RESULT.write_text(page(command, graphs, equals))
    show([graphs, equals], Console())
    return 0 if graphs.good and equals.good else 1


if __name__ == "__main__":
    sys.exit(main())
