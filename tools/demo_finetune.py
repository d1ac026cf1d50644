"""`make demo-finetune`: a Hugging Face model learns answers by LoRA on two ranks, and transformers shows that it did.

    python tools/demo_finetune.py [--steps N] [--base-steps N] [--folder DIR] [--results DIR]

1. a small Llama, trained by transformers on Python's own documentation, saved in Hugging Face's format
2. what some functions of the standard library do, by their docstrings: questions and answers as JSON lines
3. `nxdt-nemo run --config configs/demo_finetune.yaml`: the base is imported, LoRA trains on two ranks with TP=2
4. `nxdt-nemo ckpt merge` and `ckpt adapter`: the tuned model as Hugging Face's, and the adapter as peft's
5. transformers loads the base, the merged model, and the base with its adapter, and asks each all questions
Needs no network. Proof: tests/tools/test_demo_finetune.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from demo_lib.curves import event_files, read_scalars
from demo_lib.data import prepare_data
from demo_lib.report import Rows, cell, listed, table, versions
from demo_lib.runs import ChildError, quoted, run_child
from demo_lib.stages import Stages, exit_code, shown, staged

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo_finetune.yaml"
FUNCTIONS = (
    *("textwrap.dedent", "os.path.join", "shutil.copytree", "statistics.median", "bisect.insort_right"),
    *("json.dumps", "random.shuffle", "glob.glob", "shutil.rmtree", "heapq.heappop", "calendar.isleap"),
    "difflib.get_close_matches",
)


@dataclass(frozen=True)
class Plan:
    """Where things go and how long is trained."""

    folder: Path
    steps: int
    base_steps: int

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "finetune"

    @property
    def base(self) -> Path:
        return self.run / "base"

    @property
    def questions(self) -> Path:
        return self.run / "questions.jsonl"

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"


def question(name: str) -> dict[str, str]:
    """What a function does, by the first sentence of its docstring."""
    module, _, function = name.rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(module), function)) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]
    return {"input": f"Question: what does {name} do? Answer:", "output": sentence}


def make_base(plan: Plan, stages: Stages) -> float:
    """The base model; returns its last loss."""
    log = plan.run / "base.log"
    stages.begin(f"base model, {plan.base_steps} steps of transformers", plan.base_steps)

    def losses() -> list[str]:
        return re.findall(r"^step \d+ loss ([\d.]+)$", log.read_text(errors="replace"), re.MULTILINE)

    def tick() -> bool:
        if found := losses():
            stages.update(len(found), f"loss {found[-1]}")
        return False

    command = [sys.executable, ROOT / "tools/demo_lib/base_model.py", plan.data, plan.base, str(plan.base_steps)]
    seconds = run_child("training the base model", command, log, tick=tick)
    stages.end(f"loss {losses()[-1]}, {seconds:.0f} s")
    return float(losses()[-1])


def tune(plan: Plan, stages: Stages) -> Path:
    """LoRA on two ranks; returns the adapter's .nemo."""
    log = plan.run / "train.log"
    stages.begin("LoRA, two ranks, TP=2", plan.steps)

    def tick() -> bool:
        losses = read_scalars(event_files(plan.run)).get("reduced_train_loss", [])
        stages.update(len(losses), f"loss {losses[-1][1]:.3f}" if losses else "importing the base model")
        return False

    command = [
        *(sys.executable, "-m", "nxdt_nemo", "run", "--config", CONFIG),
        f"exp_manager.explicit_log_dir={quoted(plan.run / 'train')}",
        f"model.restore_from_path={quoted(plan.base)}",
        f"model.tokenizer.model={quoted(plan.base / 'tokenizer.model')}",
        f"model.data.train_ds.file_names=[{quoted(plan.questions)}]",
        f"trainer.max_steps={plan.steps}",
        f"trainer.val_check_interval={max(plan.steps // 3, 1)}",
    ]
    seconds = run_child("fine-tuning", command, log, tick=tick)
    losses = dict(read_scalars(event_files(plan.run)).get("reduced_train_loss", []))
    found = sorted((plan.run / "train").rglob("*.nemo"))
    if max(losses, default=0) != plan.steps or len(found) != 1:
        raise ChildError("fine-tuning", log, f"{len(losses)} steps and {len(found)} .nemo files")
    stages.end(f"loss {losses[plan.steps]:.3f}, {seconds:.0f} s")
    return found[0]


def export(plan: Plan, adapter: Path, stages: Stages) -> None:
    """The merged model and peft's folder."""
    stages.begin("merge, export")
    for name, target in (("merge", plan.merged), ("adapter", plan.adapter)):
        command = [sys.executable, "-m", "nxdt_nemo", "ckpt", name, plan.base, adapter, target]
        run_child(f"ckpt {name}", command, plan.run / "export.log")
    stages.end(f"{shown(plan.merged)}, {shown(plan.adapter)}")


@dataclass(frozen=True)
class Answers:
    """Of each model the answers in the order of the questions, and their loss."""

    base: list[str]
    merged: list[str]
    adapter: list[str]
    losses: dict[str, float]


def ask(plan: Plan, stages: Stages) -> Answers:
    """What transformers makes of the base, of the export, and of the base with its adapter."""
    stages.begin("transformers asks the models")
    log = plan.run / "answers.log"
    script = ROOT / "tools/demo_lib/answers.py"
    run_child("asking", [sys.executable, script, plan.questions, plan.base, plan.merged, plan.adapter], log)
    found = json.loads(next(line for line in log.read_text().splitlines() if line.startswith('{"base"')))
    stages.end("")
    return Answers(
        **{name: each["answers"] for name, each in found.items()},
        losses={name: each["loss"] for name, each in found.items()},
    )


def right(answers: list[str], pairs: list[dict[str, str]]) -> int:
    """How many are word for word what was trained."""
    return sum(answer == pair["output"] for answer, pair in zip(answers, pairs, strict=True))


def demo(plan: Plan, console: Console, results: Path | None) -> int:
    """All steps and the table; 1 when the answers are not what was trained."""
    began = time.monotonic()
    shutil.rmtree(plan.run, ignore_errors=True)
    plan.run.mkdir(parents=True)
    with staged(console) as stages:
        prepare_data(plan.data, stages)
        base_loss = make_base(plan, stages)
        pairs = [question(name) for name in FUNCTIONS]
        plan.questions.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        adapter = tune(plan, stages)
        export(plan, adapter, stages)
        found = ask(plan, stages)
    scalars = read_scalars(event_files(plan.run))
    validation = scalars["validation_loss"][-1][1]
    first, last = scalars["reduced_train_loss"][0][1], scalars["reduced_train_loss"][-1][1]
    count = len(pairs)
    told = {name: f"{right(getattr(found, name), pairs)} of {count}" for name in ("base", "merged", "adapter")}
    rows: Rows = [
        ("base model", f"Llama of transformers, {plan.base_steps} steps, loss {base_loss:.3f}"),
        ("LoRA", f"{plan.steps} steps on 2 ranks, TP=2: loss {first:.3f} → {last:.3f}"),
        ("right answers, base", f"{told['base']}, loss {found.losses['base']:.4f}"),
        ("right answers, merged", f"{told['merged']}, loss {found.losses['merged']:.4f}"),
        ("right answers, base + peft", f"{told['adapter']}, loss {found.losses['adapter']:.4f}"),
        ("validation loss by NeMo, TP=2", f"{validation:.4f}"),
        ("total time", f"{time.monotonic() - began:.0f} s"),
    ]
    for pair, before, after in list(zip(pairs, found.base, found.merged, strict=True))[:4]:
        console.print(f"[bold]{escape(pair['input'])}[/]", highlight=False)
        console.print(f"  before: {escape(before[:100])}", highlight=False)
        console.print(f"  after:  {escape(after)}", highlight=False)
    console.print(table(rows))
    if results:
        results.mkdir(parents=True, exist_ok=True)
        (results / "demo_finetune.md").write_text(page(rows, pairs, found), encoding="utf-8")
    if right(found.merged, pairs) > right(found.base, pairs) and found.merged == found.adapter:
        return 0
    console.print("[red]demo: the tuned model does not answer as it was trained[/]")
    return 1


def page(rows: Rows, pairs: list[dict[str, str]], found: Answers) -> str:
    """docs/results/demo_finetune.md."""
    asked = "\n".join(
        f"| {cell(pair['input'])} | {cell(before[:80])} | {cell(after)} |"
        for pair, before, after in zip(pairs, found.base, found.merged, strict=True)
    )
    return (
        "# The fine-tuning demo: a Hugging Face model learns answers by LoRA on two ranks\n\n"
        f"`make demo-finetune`, {date.today().isoformat()}. {versions()}.\n"
        "Written by `tools/demo_finetune.py --results`; every number is of that one run. Answers are transformers' "
        "greedy ones, from the base model and from the merged export.\n\n"
        f"{listed(rows)}\n\n"
        f"| Question | Before | After |\n|---|---|---|\n{asked}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fine-tune a small Hugging Face model by LoRA on this machine.")
    parser.add_argument("--steps", type=int, default=120, help="steps of LoRA")
    parser.add_argument("--base-steps", type=int, default=150, help="steps that the base model is trained")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes")
    parser.add_argument("--results", type=Path, help="also write demo_finetune.md to this folder")
    options = parser.parse_args(arguments)
    plan, console = Plan(options.folder.resolve(), options.steps, options.base_steps), Console()
    return exit_code(console, lambda: demo(plan, console, options.results))


if __name__ == "__main__":
    sys.exit(main())
