"""Resumed at each boundary of an epoch, a run is the run that went through: rows of the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nxdt_nemo.testing.script_run import Run, read_tensors, run, tiny

__all__ = ["BOUNDARIES", "EPOCH", "LAYOUTS", "OPTIMIZERS", "SCRIPT", "STEPS", "Row", "rows"]

SCRIPT = Path(__file__).with_name("script.py")
EPOCH, STEPS = 4, 9
SECONDS = 1800  # a job takes ten on an idle machine
LAYOUTS = {
    "one rank": (),
    "TP=2": ("trainer.devices=2", "model.tensor_model_parallel_size=2"),
    "PP=2": ("trainer.devices=2", "model.pipeline_model_parallel_size=2"),
    "DP=2": ("trainer.devices=2",),
}
OPTIMIZERS = ("fused_adam", "adamw", "distributed_fused_adam", "mcore_distributed_optim")
BOUNDARIES = {  # title: where the checkpoint was saved, in epochs of EPOCH steps, validated every second
    "in a validation": "validation 2",
    "mid-epoch": "step 3",
    "at its end": "step 4",
    "after it": "step 5",
}
KEYS = (
    f"trainer.max_steps={STEPS}",
    f"+trainer.limit_train_batches={EPOCH}",
    "trainer.val_check_interval=2",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "exp_manager.checkpoint_callback_params.save_top_k=0",
)


@dataclass(frozen=True)
class Row:
    """A layout with an optimizer: by boundary, what differs from the uninterrupted run; "" if nothing does."""

    layout: str
    optimizer: str
    differs: dict[str, str]

    @property
    def good(self) -> bool:
        return not any(self.differs.values())


def _row(layout: str, optimizer: str, corpus: Path, folder: Path) -> Row:
    """Train once without interruption, saving at each boundary, and once from each of these checkpoints."""
    keys = (*KEYS, *LAYOUTS[layout], f"model.optim.name={optimizer}")
    saves = folder / "saves"
    whole = _train(corpus, folder / "whole", keys, SAVES_AT=",".join(BOUNDARIES.values()), SAVES_TO=str(saves))
    if whole.code:
        raise SystemExit(f"resume: {layout}, {optimizer} ended with {whole.code}:\n{whole.output[-3000:]}")

    def resumed(place: str) -> str:
        [saved] = saves.glob(f"{place.replace(' ', '=')}-*")
        rest = _train(corpus, folder / place, (*keys, f"+exp_manager.resume_from_checkpoint='{saved}'"))
        return _difference(whole, rest, int(place.split()[1]))

    with ThreadPoolExecutor(1 if LAYOUTS[layout] else 2) as pool:  # two processes at a time
        return Row(layout, optimizer, dict(zip(BOUNDARIES, pool.map(resumed, BOUNDARIES.values()), strict=True)))


def _train(corpus: Path, folder: Path, keys: tuple[str, ...], **environment: str) -> Run:
    folder.mkdir(parents=True)
    arguments = [*tiny(corpus, folder), *keys]
    noted = environment | {"NOTES": str(folder / "notes")}
    return run(SCRIPT, arguments, folder, seconds=SECONDS, environment=noted, cwd=folder)


def _difference(whole: Run, rest: Run, done: int) -> str:
    """What the resumed run has otherwise than the whole one after `done` steps, to the bit."""
    if rest.code:
        return f"ended with {rest.code}: {rest.output.strip().splitlines()[-1]}"
    expected, found = _notes(whole), _notes(rest)
    later = {rank: lines[done:] for rank, lines in expected.items()}
    if len({line["reduced_train_loss"] for lines in expected.values() for line in lines}) < STEPS:
        return "nothing was trained"
    for rank, lines in later.items():
        for line, other in zip(lines, found.get(rank, []), strict=False):
            changed = [name for name in line if line[name] != other.get(name)]
            if changed:
                return f"{', '.join(changed)} of step {line['step']}"
        if len(lines) != len(found.get(rank, [])):
            return f"{len(found.get(rank, []))} steps, not {len(lines)}"
    validated, again = whole.curve("val_loss"), rest.curve("val_loss")
    if changed := {step: value for step, value in validated.items() if step > done and again.get(step) != value}:
        return f"val_loss of {changed}, not {again}"
    ended, other = (read_tensors(_last(side)) for side in (whole, rest))
    wrong = [name for name in ended if name not in other or not torch.equal(ended[name], other[name])]
    return f"{wrong[0]} at the end" if wrong or ended.keys() != other.keys() else ""


def _last(side: Run) -> Path:
    [found] = (side.folder / "checkpoints").glob("*-last")
    return found


def _notes(side: Run) -> dict[str, list[dict[str, Any]]]:
    files = sorted(side.folder.glob("notes.*"))
    return {file.suffix: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def rows(layouts: list[str], optimizers: list[str], corpus: Path, folder: Path) -> Iterator[Row]:
    """A Row for each layout with each optimizer."""
    for layout in layouts:
        for optimizer in optimizers:
            place = folder / f"{layout} {optimizer}".replace(" ", "_").replace("=", "")
            yield _row(layout, optimizer, corpus, place)
            shutil.rmtree(place)
