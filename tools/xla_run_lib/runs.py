"""Runs of the stock NeMo script on the xla lane, and what they counted: rows of the table."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.testing.script_run import Run, run, tiny

__all__ = ["MODELS", "PRECISIONS", "Counted", "Job", "counted", "error_of", "losses"]

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
WARM_STEPS, WARM_VALIDATIONS = 2, 2


@dataclass(frozen=True)
class Job:
    """What is run: stock layers or ours; further keys."""

    model: str
    precision: str
    steps: int
    every: int
    stock: bool = False
    keys: tuple[str, ...] = ()

    def overrides(self, corpus: Path, folder: Path) -> list[str]:
        """Its command line."""
        given = (*KEYS, *MODELS[self.model], *PRECISIONS[self.precision], *self.keys)
        lengths = (f"trainer.max_steps={self.steps}", f"trainer.val_check_interval={self.every}")
        given = (*given, f"model.data.data_prefix=[{corpus / 'text_document'}]")  # a weight excludes a whole validation
        return [*tiny(corpus, folder), *given, *lengths, "trainer.log_every_n_steps=10"]


@dataclass(frozen=True)
class Counted:
    """One process. Compilations of its parts, in order; what was read back; operations that fell off XLA.

    after_warm_up   compilations after WARM_STEPS steps and WARM_VALIDATIONS validations
    asked           values that a logger or a drawn bar got, a step later
    unasked         values read in steps beyond those
    """

    set_up: int
    steps: list[int]
    validations: list[int]
    end: int
    after_warm_up: int
    asked: int
    unasked: int
    fallen: dict[str, int]
    milliseconds: float
    done: int

    @classmethod
    def of(cls, folder: Path) -> Counted:
        """From what script.py left."""
        found = json.loads((folder / "counts.json").read_text())
        parts = found["parts"]
        # What Lightning resets after a validation is handed over when the next step begins: it belongs to it.
        steps, validations, set_up, end = [], [], 0, 0
        warm, after, reads, last = False, 0, 0, "set-up"
        for part in parts:
            compiled, kind = part.get("compiled", 0), part["part"]
            if kind == "step":
                steps.append(compiled)
                reads += part.get("read", 0)
                after += compiled if warm else 0
                last = "step"
            elif kind == "validation":
                validations.append(compiled)
                after += compiled if len(validations) > WARM_VALIDATIONS else 0
                last = "validation"
            elif kind == "end":
                end = compiled
            elif not steps:
                set_up += compiled
            elif last == "validation":
                validations[-1] += compiled
                after += compiled if len(validations) > WARM_VALIDATIONS else 0
            else:
                after += compiled if warm else 0
                steps[-1] += compiled
            warm = len(steps) >= WARM_STEPS
        asked = sum(part.get("asked", 0) for part in parts)
        fallen: dict[str, int] = {}
        for part in parts:
            if part["part"] == "step":
                for name, number in part.items():
                    if name.startswith("aten::"):
                        fallen[name] = fallen.get(name, 0) + number
        fallen = {name: number for name, number in fallen.items() if number}
        times = found["seconds"][WARM_STEPS:] or [0.0]
        unasked = max(0, reads - asked)
        return cls(
            set_up, steps, validations, end, after, asked, unasked, fallen, 1e3 * statistics.median(times), len(steps)
        )

    @property
    def good(self) -> bool:
        """Nothing compiled after the warm-up, nothing read that nobody asked for, nothing off XLA."""
        return not (self.after_warm_up or self.unasked or self.fallen)


def counted(job: Job, corpus: Path, folder: Path, lane: str = "xla") -> tuple[Run, Counted | None]:
    """Run it, in a folder that may hold a run to go on from; None where it ended before its first step."""
    counts = folder / "counts.json"
    folder.mkdir(parents=True, exist_ok=True)
    counts.unlink(missing_ok=True)
    environment = {"NXDT_NEMO_RUNTIME": lane, "STOCK": "1" if job.stock else ""}
    if lane == "xla":
        environment["COUNTS"] = str(counts)
    done = run(SCRIPT, job.overrides(corpus, folder), folder, seconds=SECONDS, environment=environment, cwd=folder)
    return done, Counted.of(folder) if counts.exists() else None


def losses(job: Job, corpus: Path, folder: Path, say: Callable[[str], Any]) -> tuple[float, float, float]:
    """Each step of a run on the xla lane against the cpu lane's: largest relative difference of training losses and of
    validation losses, and by how much the loss fell."""
    curves = []
    for lane in ("cpu", "xla"):
        keys = (*job.keys, "trainer.log_every_n_steps=1", "exp_manager.create_checkpoint_callback=false")
        there = Job(job.model, job.precision, job.steps, job.every, job.stock, keys)
        arguments = [key for key in there.overrides(corpus, folder / lane) if key != "trainer.log_every_n_steps=10"]
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
    return _apart(cpu, xla), _apart(cpu_val, xla_val), cpu[0] - min(cpu.values())


def _apart(one: dict[int, float], other: dict[int, float]) -> float:
    return max(abs(one[step] - other[step]) / abs(one[step]) for step in one)


def error_of(done: Run) -> str:
    """The last line of a failed run that says what went wrong."""
    lines = [line for line in done.output.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
    return lines[-1][:160] if lines else f"exit code {done.code}"
