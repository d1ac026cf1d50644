"""The stock NeMo script on the xla lane, on XLA:CPU: how many graphs a run compiles, and what the host reads back.

    python tools/xla_run.py                             # half an hour; writes docs/results/xla_run.md
    python tools/xla_run.py --steps 24 --models llama   # some of it; prints only
    python tools/xla_run.py --steps 100 --write         # a shorter one, kept

A tiny GPT and Llama on one rank, in float32 and bf16 with float32 main parameters: steps with validations whose last
batch is not full, logging every tenth, the progress bar and the preemption callback on, a checkpoint at each
validation, and a second process that goes on from the middle. Beside it megatron-core's own modules on the same lane,
for a few steps; and every loss of 30 steps against the cpu lane. Exit code 1 when a run of ours compiles after its
warm-up (2 steps, 2 validations of 4), reads a value that nobody asked for, or one more often than it logs and draws,
has an operation off XLA, or has another loss.
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
from xla_run_lib.runs import LOG_EVERY, MODELS, PRECISIONS, Counted, Job, counted, error_of, losses

from nxdt_nemo.testing.script_run import write_corpus

RESULT = Path(__file__).parents[1] / "docs" / "results" / "xla_run.md"
STEPS, EQUAL_STEPS, STOCK_STEPS = 1000, 30, 12
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
COLUMNS = (
    "model", "precision", "layers", "process", "steps", "set-up", "steps' graphs", "validations'", "end",
    "after warm-up", "logged", "drawn", "drawings", "unasked", "off XLA", "ms a step",
)  # fmt: skip


def line(job: Job, process: str, found: Counted | None, trouble: str) -> Line:
    """One process; for megatron-core's own modules whatever comes is good."""
    left = [job.model, job.precision, "megatron-core's" if job.stock else "ours", process]
    if found is None or trouble:
        return Line([*left, trouble, *[""] * (len(COLUMNS) - 5)], job.stock)
    compiled = [" ".join(map(str, [*part[:2], sum(part[2:])])) for part in (found.steps, found.validations)]
    fallen = ", ".join(f"{number} {name}" for name, number in found.fallen.items()) or "0"
    read = [found.logged, found.drawn, found.drawings, f"{found.warming} {found.unasked}"]
    numbers = [found.done, found.set_up, *compiled, found.end, found.after_warm_up, *read]
    cells = [*left, *map(str, numbers), fallen, f"{found.milliseconds:.0f}"]
    return Line(cells, job.stock or found.good)


def compiles(args: argparse.Namespace, corpus: Path, folder: Path) -> Sheet:
    """One line a process: the first half, the half that goes on from it, and megatron-core's own modules."""
    sheet = Sheet("graphs compiled, and tensors read back, by part of the run", COLUMNS)
    half, every = args.steps // 2, max(1, args.steps // 8)
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


def page(args: argparse.Namespace, command: str, graphs: Sheet, equals: Sheet) -> str:
    """docs/results/xla_run.md."""
    return f"""# A NeMo run on the xla lane

{heading(command).replace("cpu lane", f"xla lane on XLA:CPU, torch-xla {version('torch-xla')}")}

The stock calls (`MegatronTrainerBuilder`, `exp_manager`, `trainer.fit`) on real `.bin/.idx` data, one rank: a GPT
(LayerNorm, GELU, biases, learned positions, tied embeddings) and a Llama (RMSNorm, SwiGLU, RoPE, grouped queries) of
two layers. bf16 is `precision: bf16` with `megatron_amp_O2`. `validation_drop_last: False` with a last batch that is
not full, logging every {LOG_EVERY} steps, progress bar and preemption callback on, a checkpoint at each of the
validations; "resumed" is a new process that goes on from the middle.

{graphs.markdown}

"set-up" to "end" are graphs compiled. "steps' graphs" are the first step's, the second's, and those of all later ones:
the first makes rotary angles and Lightning's metrics, all others run the second's. "validations'" likewise, each with
its save: one that keeps its last batch reads each loss (upstream's code), a graph for each piece between two readings,
for each shape of batch; a checkpoint's slices are small graphs by shape. "after warm-up" is what came after 2 steps and
2 validations, of {args.steps // 2} and 4.

What the host reads from the beginning of a step to the next one's or to a validation's, callbacks included: "logged"
is how often loggers asked, at most once in {LOG_EVERY} steps; "drawn" how often the progress bar asked, at most once in
each of its "drawings" (twice a second, if a step is faster); both get their values a step later. "unasked" is
everything else that was read, in the first 2 steps (a bar has no loss to show yet, and waits for one) and in all
others. "off XLA" are operations of the whole process; a number that a validation or a save reads counts as none.
"ms a step" is wall-clock time; the machine's load was {os.getloadavg()[0]:.0f} at the end, on {os.cpu_count()} cores.
"megatron-core's" keeps the lane and the strategy, and puts upstream's own layers, cross entropy, embedding, gradient
norm and buffers back, for {STOCK_STEPS} steps: to compare, whatever it counts.

{equals.markdown}

Every step's loss, and every validation's, at a peak learning rate of 2e-3 with two steps of warm-up.
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
        RESULT.write_text(page(args, command, graphs, equals))
    show([graphs, equals], Console())
    return 0 if graphs.good and equals.good else 1


if __name__ == "__main__":
    sys.exit(main())
