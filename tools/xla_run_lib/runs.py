"""Runs of the stock NeMo script on the xla lane, and what they counted: rows of the table."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.script_run import Run, run, tiny

__all__ = ["LOG_EVERY", "MODELS", "PRECISIONS", "Counted", "Job", "counted", "error_of", "losses"]

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
LOG_EVERY = 10
ITEM = "aten::_local_scalar_dense"  # what torch_xla counts where a tensor's number is read


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
        return [*tiny(corpus, folder), *given, *lengths, f"trainer.log_every_n_steps={LOG_EVERY}"]


@dataclass(frozen=True)
class Counted:
    """One process. Compilations of its parts, in order; what was read back; operations that fell off XLA.

    after_warm_up   compilations after WARM_STEPS steps and WARM_VALIDATIONS validations with their saves
    logged, drawn   how often loggers and the progress bar asked in steps for what they get a step later
    drawings        of the bar in steps
    unasked         values read otherwise, from the beginning of a step to the next one's or to a validation's
    warming         those of the first WARM_STEPS steps
    fallen          by name; outside of steps the reading of a number is none
    """

    set_up: int
    steps: list[int]
    validations: list[int]
    end: int
    after_warm_up: int
    logged: int
    drawn: int
    drawings: int
    unasked: int
    warming: int
    fallen: dict[str, int]
    milliseconds: float

    @classmethod
    def of(cls, folder: Path) -> Counted:
        """From what script.py left."""
        found = json.loads((folder / "counts.json").read_text())
        compiled: dict[str, list[int]] = {"set-up": [0], "step": [], "validation": [], "end": [0]}
        sums, fallen = Counter[str](), Counter[str]()
        # What is between two parts belongs to the one before: after a step the bar and other callbacks, after a
        # validation its save, and what Lightning resets.
        of, after = "set-up", 0
        for part in found["parts"]:
            kind, number = part["part"], part.get("compiled", 0)
            warm = len(compiled["step"]) >= WARM_STEPS
            if kind == "between":
                compiled[of][-1] += number
            else:
                of = kind
                compiled[of] = [*compiled[of], number] if of in ("step", "validation") else [number]
            late = len(compiled["validation"]) > WARM_VALIDATIONS
            after += number if (of == "step" and warm) or (of == "validation" and late) else 0
            names = [name for name in part if name.startswith("aten::") and ((of == "step" and warm) or name != ITEM)]
            fallen.update({name: part[name] for name in names if part[name]})
            if of == "step":
                unasked = max(0, part.get("read", 0) - part.get("arrived", 0))
                sums.update({"unasked" if warm else "warming": unasked})
                sums.update({name: part.get(name, 0) for name in ("logger", "bar", "drawn")})
        return cls(
            set_up=compiled["set-up"][0],
            steps=compiled["step"],
            validations=compiled["validation"],
            end=compiled["end"][0],
            after_warm_up=after,
            logged=sums["logger"],
            drawn=sums["bar"],
            drawings=sums["drawn"],
            unasked=sums["unasked"],
            warming=sums["warming"],
            fallen=dict(fallen),
            milliseconds=1e3 * statistics.median(found["seconds"][WARM_STEPS:] or [0.0]),
        )

    @property
    def done(self) -> int:
        """Steps."""
        return len(self.steps)

    @property
    def good(self) -> bool:
        """Nothing compiled after the warm-up, nothing off XLA, nothing read but where something is logged, where the
        bar is drawn, and once before a bar has a loss to show."""
        often = self.logged > self.done // LOG_EVERY + 1 or self.drawn > self.drawings or self.warming > 1
        return not (self.after_warm_up or self.unasked or self.fallen or often)


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
        arguments = [
            key for key in there.overrides(corpus, folder / lane) if key != f"trainer.log_every_n_steps={LOG_EVERY}"
        ]
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
    apart = [relative([*there.values()], [*here.values()]) for there, here in ((xla, cpu), (xla_val, cpu_val))]
    return apart[0], apart[1], cpu[0] - min(cpu.values())


def error_of(done: Run) -> str:
    """The last line of a failed run that says what went wrong."""
    lines = [line for line in done.output.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
    return lines[-1][:160] if lines else f"exit code {done.code}"
