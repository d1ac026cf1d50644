"""`make demo`: from plain text to a trained, resumed and talking Llama, on this machine, in a few minutes.

    python tools/demo.py [--steps N] [--folder DIR] [--results DIR]

Corpus, SentencePiece model and .bin/.idx go to FOLDER/data and are reused; FOLDER/run is started afresh.
Training runs tests/nemo/gpt_pretraining.py, a script that says nothing about Trainium, through `nxdt-nemo
run`: two ranks by Lightning's own launcher, tensor parallel. After two thirds of the steps it is killed, and
a second run resumes from its last checkpoint. Needs no network. The pieces are in tools/demo_lib/.
Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from demo_lib.corpus import LICENCE
from demo_lib.curves import Curve, event_files, read_scalars, save_picture, terminal_plot
from demo_lib.data import prepare_data
from demo_lib.report import Rows, loss_rows, markdown, speed, table
from demo_lib.runs import ChildError, quoted, run_child
from demo_lib.stages import Stages, exit_code, shown, staged

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo_llama.yaml"
TRAIN_SCRIPT = ROOT / "tests" / "nemo" / "gpt_pretraining.py"
GENERATE_SCRIPT = ROOT / "tools" / "demo_generate.py"
PROMPTS = ("Return the number of", "The function raises an exception if", "This module provides")


@dataclass(frozen=True)
class Plan:
    """Where things go and how far training runs.

    steps     of the whole training
    stop      step from whose checkpoint the second run resumes; a multiple of `validate`
    validate  steps between two validations, and between two checkpoints
    """

    folder: Path
    steps: int
    stop: int
    validate: int

    @property
    def kill(self) -> int:
        """The step behind which the first run is killed; some work is lost, as in real life."""
        return self.stop + max(self.validate // 2, 1)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def prefix(self) -> Path:
        return self.data / "corpus_text_document"


def make_plan(folder: Path, steps: int) -> Plan:
    """Validate (and save) six times, kill and resume after four of them."""
    validate = max(steps // 6, 1)
    return Plan(folder.resolve(), validate * 6, validate * 4, validate)


def nemo_command(script: Path, plan: Plan, *overrides: str) -> list[str | Path]:
    """`nxdt-nemo run script` with the demo's configuration and paths."""
    return [
        *(sys.executable, "-m", "nxdt_nemo", "run", script),
        *(f"--config-path={CONFIG.parent}", f"--config-name={CONFIG.stem}"),
        f"exp_manager.explicit_log_dir={quoted(plan.run / 'train')}",
        f"model.tokenizer.model={quoted(plan.data / 'tokenizer.model')}",
        f"model.data.data_prefix=[{quoted(plan.prefix)}]",
        f"model.data.index_mapping_dir={quoted(plan.run / 'index')}",
        *overrides,
    ]


@dataclass(frozen=True)
class Run:
    """One training process: its output file and what it logged."""

    log: Path
    scalars: dict[str, Curve]

    @property
    def losses(self) -> Curve:
        return self.scalars.get("reduced_train_loss", [])


def train(plan: Plan, stages: Stages, *, after: int) -> Run:
    """Train to the end from step `after`: NeMo resumes by itself from the newest checkpoint of the folder.

    From step 0 training is killed about half-way between the checkpoint of `plan.stop` and the next one.
    """
    name = f"resume at {after}, train to {plan.steps}" if after else f"train on two ranks, kill at {plan.kill}"
    log, before = plan.run / f"train-from-{after}.log", set(event_files(plan.run))
    stages.begin(name, plan.steps - after)

    def logged() -> Run:
        return Run(log, read_scalars(path for path in event_files(plan.run) if path not in before))

    def tick() -> bool:
        losses = logged().losses
        stages.update(len(losses), f"loss {losses[-1][1]:.3f}" if losses else "importing NeMo")
        return not after and bool(losses) and losses[-1][0] >= plan.kill and _step(last_checkpoint(plan)) == plan.stop

    overrides = [
        *(f"trainer.max_steps={plan.steps}", f"trainer.val_check_interval={plan.validate}"),
        f"model.optim.sched.warmup_steps={min(10, plan.validate)}",
    ]
    seconds = run_child(name, nemo_command(TRAIN_SCRIPT, plan, *overrides), log, tick=tick)
    run = logged()
    steps = [step for step, _ in run.losses]
    if steps != list(range(after + 1, (steps[-1] if steps else 0) + 1)) or (after and steps[-1] != plan.steps):
        raise ChildError(name, log, f"steps {steps[:1]} to {steps[-1:]} were logged instead of {after + 1} onwards")
    if not after and steps[-1] == plan.steps:
        raise ChildError(name, log, f"training ended before it could be killed; more than {plan.steps} steps would do")
    stages.end(f"{'' if after else 'killed at '}step {steps[-1]}, loss {run.losses[-1][1]:.3f}, {seconds:.0f} s")
    return run


def repeated(first: Run, second: Run) -> str:
    """How the steps that both runs made compare: those between the checkpoint and the kill."""
    once, again = dict(first.losses), dict(second.losses)
    both = sorted(once.keys() & again.keys())
    worst = max(abs(once[step] - again[step]) for step in both)
    verdict = "equal to the bit" if worst == 0 else f"NOT equal, by up to {worst:.1e}"
    return f"killed at step {both[-1]}, resumed at {both[0]}; repeated losses {verdict}"


def last_checkpoint(plan: Plan) -> Path:
    """The newest `-last` checkpoint of the training."""
    found = sorted((plan.run / "train" / "checkpoints").glob("*-last"), key=_step)
    if not found:
        raise FileNotFoundError(f"no '-last' checkpoint under {plan.run / 'train' / 'checkpoints'}")
    return found[-1]


def _step(checkpoint: Path) -> int:
    match = re.search(r"step=(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def generate(plan: Plan, stages: Stages) -> list[dict[str, str]]:
    """Continue the prompts on one rank, from the checkpoint that two ranks wrote."""
    log, checkpoint = plan.run / "generate.log", last_checkpoint(plan)
    stages.begin("generate on one rank")
    overrides = [
        *("trainer.devices=1", "model.tensor_model_parallel_size=1"),
        *(f"+checkpoint_dir={quoted(checkpoint.parent)}", f"+checkpoint_name={quoted(checkpoint.name)}"),
        f"+prompts={json.dumps(PROMPTS)}",
    ]
    seconds = run_child("generating", nemo_command(GENERATE_SCRIPT, plan, *overrides), log)
    lines = log.read_text(errors="replace").splitlines()
    samples = [json.loads(line.removeprefix("sample: ")) for line in lines if line.startswith("sample: ")]
    if len(samples) != len(PROMPTS):
        raise ChildError("generating", log, f"{len(samples)} samples instead of {len(PROMPTS)}")
    stages.end(f"{len(samples)} prompts, {seconds:.0f} s")
    return samples


def lane(log: Path) -> str:
    """The lane as the backend announced it at start-up, with its reason."""
    match = re.search(r"\blane \w+.*", log.read_text(errors="replace"))
    return match[0].removeprefix("lane ").strip() if match else "not announced"


def summary(plan: Plan, counts: dict[str, int], first: Run, second: Run, seconds: float) -> Rows:
    """The rows of the closing table."""
    scalars, cfg = read_scalars(event_files(plan.run)), OmegaConf.load(CONFIG)
    model, batch, length = cfg.model, cfg.model.global_batch_size, cfg.model.encoder_seq_length
    return [
        *loss_rows(scalars["reduced_train_loss"], scalars["val_loss"]),
        (
            "tokens/s",
            f"{speed(scalars['train_step_timing in s'], batch * length):.0f} (median step, {batch} x {length})",
        ),
        ("ranks", f"{cfg.trainer.devices}, by Lightning's launcher"),
        ("layout", f"TP={model.tensor_model_parallel_size} PP={model.pipeline_model_parallel_size} DP=1"),
        ("lane", lane(first.log)),
        ("resume", repeated(first, second)),
        ("corpus", f"{LICENCE}: {counts['bytes'] / 1e6:.2f} MB, {counts['tokens']} tokens"),
        ("checkpoint", shown(last_checkpoint(plan))),
        ("TensorBoard log", shown(plan.run / "train")),
        ("total time", f"{seconds:.0f} s"),
    ]


def demo(plan: Plan, console: Console, results: Path | None) -> None:
    """All steps, then the table and the curve."""
    began = time.monotonic()
    shutil.rmtree(plan.run, ignore_errors=True)
    plan.run.mkdir(parents=True)
    with staged(console) as stages:
        counts = prepare_data(plan.data, stages)
        first = train(plan, stages, after=0)
        second = train(plan, stages, after=plan.stop)
        samples = generate(plan, stages)
    scalars = read_scalars(event_files(plan.run))
    curves = {"train loss": scalars["reduced_train_loss"], "validation loss": scalars["val_loss"]}
    rows = summary(plan, counts, first, second, time.monotonic() - began)
    save_picture(curves, plan.run / "loss.png", title="Llama, 2 ranks, tensor parallel", mark=plan.stop)
    for line in terminal_plot(curves, width=min(console.width, 80), mark=plan.stop):
        console.print(line, highlight=False)
    for sample in samples:
        rest = sample["text"].removeprefix(sample["prompt"])
        console.print(f"[bold]{escape(sample['prompt'])}[/]{escape(rest)}", highlight=False)
    console.print(table([*rows, ("picture", shown(plan.run / "loss.png"))]))
    if results:
        results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.run / "loss.png", results / "demo_loss.png")
        page = markdown(rows, samples, command="make demo", picture="demo_loss.png")
        (results / "demo.md").write_text(page, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train, resume and try a small Llama on this machine.")
    parser.add_argument("--steps", type=int, default=120, help="training steps, rounded down to a multiple of 6")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--results", type=Path, help="also write demo.md and demo_loss.png to this folder")
    options = parser.parse_args(arguments)
    plan, console = make_plan(options.folder, options.steps), Console()
    return exit_code(console, lambda: demo(plan, console, options.results))


if __name__ == "__main__":
    sys.exit(main())
