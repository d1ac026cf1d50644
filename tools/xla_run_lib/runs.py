"""Runs of the stock NeMo script on the xla lane, and what they counted: rows of the table."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nxdt_nemo.lightning.progress import SECONDS as BETWEEN_DRAWINGS
from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.script_run import Run, run, tiny

__all__ = ["MODELS", "PRECISIONS", "Counted", "Job", "apart", "counted", "error_of", "losses"]

SCRIPT = Path(__file__).with_name("script.py")
SECONDS = 3000

# Over configs/demo_llama.yaml as script_run.tiny makes it: RMSNorm, SwiGLU, rotary positions, grouped queries.
MODELS = {
    "llama": ("model.num_query_groups=2",),
    "gpt": (
        "model.num_query_groups=4",
        "model.normalization=layernorm",
        "model.activation=gelu",
        "model.bias=true",
        "model.position_embedding_type=learned_absolute",
        "model.share_embeddings_and_output_weights=true",
        "model.bias_activation_fusion=true",
        "model.bias_dropout_add_fusion=true",
    ),
}
PRECISIONS = {"fp32": (), "bf16": ("trainer.precision=bf16", "model.megatron_amp_O2=true")}
# A global batch of 4 in micro-batches of 2; the validation's last batch is not full. What stock exp_manager turns on
# stays on: progress bar, preemption callback, step timing.
KEYS = (
    "model.global_batch_size=4",
    "model.optim.lr=2e-3",
    "model.data.validation_drop_last=false",
    "model.data.splits_string='950,50,0'",
    "trainer.limit_val_batches=1.0",
    "exp_manager.create_preemption_callback=true",
)
WARM = 2  # steps, validations and saves that may compile
LAST = 1  # graphs of the end: Lightning's metrics start afresh
LOG_EVERY = 10
LOG_VALUES, BAR_VALUES = 2, 2  # the loss and the gradients' norm; the loss and the last validation's
FIRST_DRAWING = 1  # the bar's first loss is read at once: there is none of an earlier step to show
NUMBER = "aten::_local_scalar_dense"  # a tensor read as a number: counted as a reading


@dataclass(frozen=True)
class Job:
    """What is run: stock layers or ours; further keys; the id of a patch record that is left out."""

    model: str
    precision: str
    steps: int
    every: int
    stock: bool = False
    keys: tuple[str, ...] = ()
    log_every: int = LOG_EVERY
    without: str = ""

    def overrides(self, corpus: Path, folder: Path) -> list[str]:
        """Its command line."""
        given = (*KEYS, *MODELS[self.model], *PRECISIONS[self.precision], *self.keys)
        lengths = (f"trainer.max_steps={self.steps}", f"trainer.val_check_interval={self.every}")
        given = (*given, f"model.data.data_prefix=[{corpus / 'text_document'}]")  # a weight excludes a whole validation
        return [*tiny(corpus, folder), *given, *lengths, f"trainer.log_every_n_steps={self.log_every}"]


@dataclass(frozen=True)
class Counted:
    """One process, by kind of part. What follows a step (its callbacks and loggers) is of that step; what follows a
    validation is its save, but for the last, which is of the end.

    set_up, end                graphs compiled
    steps, validations, saves  graphs that each one compiled, in order
    logged, drawn              values that the loggers, and the bar, asked for in training, to be read a step later
    most_logged, most_drawn    what a log at each LOG_EVERY steps, and the bar's least time between drawings, allow
    unasked                    values read in training beyond those, and the bar's first
    fallen                     operations that fell off XLA in any part
    """

    set_up: int
    steps: list[int]
    validations: list[int]
    saves: list[int]
    end: int
    logged: int
    most_logged: int
    drawn: int
    most_drawn: int
    unasked: int
    fallen: dict[str, int]
    milliseconds: float

    @classmethod
    def of(cls, folder: Path) -> Counted:
        """From what script.py left."""
        parts = json.loads((folder / "counts.json").read_text())
        kinds = _by_kind(parts)
        steps, validations = kinds["step"], kinds["validation"]
        training: Counter[str] = sum(steps, Counter())
        at_once = min(FIRST_DRAWING, steps[0]["read"] - steps[0]["arrived"]) if steps else 0
        pauses = WARM + len(validations)  # a drawing may follow each at once
        drawings = sum(one["seconds"] for one in steps[WARM:]) / BETWEEN_DRAWINGS + pauses + 1  # and the last step
        every: Counter[str] = sum((one for of_kind in kinds.values() for one in of_kind), Counter())
        return cls(
            set_up=_compiled(kinds["set-up"]),
            steps=[one["compiled"] for one in steps],
            validations=[one["compiled"] for one in validations],
            saves=[one["compiled"] for one in kinds["save"]],
            end=_compiled(kinds["end"]),
            logged=training["logger"],
            most_logged=math.ceil(len(steps) / LOG_EVERY) * LOG_VALUES,
            drawn=training["bar"],
            most_drawn=math.floor(drawings) * BAR_VALUES,
            unasked=training["read"] - training["arrived"] - at_once,
            fallen={name: number for name, number in every.items() if name.startswith("aten::") and name != NUMBER},
            milliseconds=1e3 * statistics.median([one["seconds"] for one in steps[WARM:]] or [0.0]),
        )

    @property
    def after_warm_up(self) -> int:
        """Graphs compiled after WARM steps, validations and saves."""
        return sum(sum(each[WARM:]) for each in (self.steps, self.validations, self.saves))

    @property
    def good(self) -> bool:
        """Steps and two validations or more came after the warm-up, and compiled nothing, the end LAST; what was read
        back is what the loggers and the bar may ask for, and they did; nothing ran off XLA."""
        late = len(self.steps) > WARM and len(self.validations) >= WARM + 2
        read = 0 < self.logged <= self.most_logged and 0 < self.drawn <= self.most_drawn and not self.unasked
        return late and read and self.end <= LAST and not (self.after_warm_up or self.fallen)


def _by_kind(parts: Iterable[dict[str, Any]]) -> dict[str, list[Counter[str]]]:
    kinds: dict[str, list[Counter[str]]] = {kind: [] for kind in ("set-up", "step", "validation", "save", "end")}
    before = "set-up"
    for part in parts:
        kind = part["part"]
        numbers = Counter({name: number for name, number in part.items() if name != "part"})
        if kind == "between" and before == "step":
            kinds["step"][-1].update(numbers)
            continue
        before = "save" if kind == "between" else kind
        kinds[before].append(numbers)
    return kinds


def _compiled(parts: Iterable[Counter[str]]) -> int:
    return sum(part["compiled"] for part in parts)


def counted(job: Job, corpus: Path, folder: Path, lane: str = "xla") -> tuple[Run, Counted | None]:
    """Run it, in a folder that may hold a run to go on from; None where it ended before its first step."""
    counts = folder / "counts.json"
    folder.mkdir(parents=True, exist_ok=True)
    counts.unlink(missing_ok=True)
    environment = {"NXDT_NEMO_RUNTIME": lane, "STOCK": "1" if job.stock else "", "WITHOUT": job.without}
    if lane == "xla":
        environment["COUNTS"] = str(counts)
    done = run(SCRIPT, job.overrides(corpus, folder), folder, seconds=SECONDS, environment=environment, cwd=folder)
    return done, Counted.of(folder) if counts.exists() else None


def losses(job: Job, corpus: Path, folder: Path, say: Callable[[str], Any]) -> tuple[float, float, float]:
    """Each step of a run on the xla lane against the cpu lane's: largest relative difference of training losses and of
    validation losses, and by how much the loss fell."""
    curves = []
    for lane in ("cpu", "xla"):
        there = replace(job, keys=(*job.keys, "exp_manager.create_checkpoint_callback=false"), log_every=1)
        arguments = there.overrides(corpus, folder / lane)
        (folder / lane).mkdir(parents=True)
        environment = {"NXDT_NEMO_RUNTIME": lane, "STOCK": ""}
        done = run(SCRIPT, arguments, folder / lane, seconds=SECONDS, environment=environment, cwd=folder / lane)
        if done.code:
            say(done.output[-3000:])
            raise SystemExit(f"{job.model} {job.precision} on the {lane} lane: exit code {done.code}")
        curves.append((done.curve(), done.curve("val_loss")))
    (cpu, cpu_val), (xla, xla_val) = curves
    if cpu.keys() != xla.keys() or cpu_val.keys() != xla_val.keys() or len(cpu) != job.steps:
        raise SystemExit(f"{job.model}: the lanes logged other steps")
    return apart(cpu, xla), apart(cpu_val, xla_val), cpu[0] - min(cpu.values())


def apart(cpu: dict[int, float], xla: dict[int, float]) -> float:
    """The largest relative difference of two curves with the same steps; infinite where a value is not finite."""
    return relative([xla[step] for step in cpu], list(cpu.values()))


def error_of(done: Run) -> str:
    """The last line of a failed run that says what went wrong."""
    lines = [line for line in done.output.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
    return lines[-1][:160] if lines else f"exit code {done.code}"
