"""Killed at random moments, again and again: what is on disk after each kill, and what the next start takes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.testing.script_run import Run, read_tensors, start, tiny
from resume_lib.boundaries import LAYOUTS, SCRIPT

__all__ = ["Kill", "kills"]

# Saves fill most of the time, so that most kills meet one; three are kept, so that others are removed meanwhile.
KEYS = (
    "trainer.max_steps=2000",
    "trainer.val_check_interval=2",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "exp_manager.checkpoint_callback_params.save_top_k=3",
)
SECONDS = 240.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL to all processes of a job, and the start after it.

    step      the last one that was done
    writing   a checkpoint was being written
    newest    the newest complete checkpoint then; resumed: the one that the next start took
    broken    a checkpoint with its own name that cannot be read, or a step that then came out otherwise; "" if none
    """

    layout: str
    step: int
    writing: bool
    newest: str
    resumed: str
    broken: str

    @property
    def good(self) -> bool:
        return _step(self.newest) == _step(self.resumed) and not self.broken


def kills(
    layout: str, optimizer: str, number: int, aimed: int, corpus: Path, folder: Path, seed: int
) -> Iterator[Kill]:
    """Kill a job in the same folder again and again; every step ever done is compared with a job left alone.

    number   at random moments
    aimed    more, at random moments of a save
    """
    moments = random.Random(seed)
    keys = (*KEYS, *LAYOUTS[layout], f"model.optim.name={optimizer}")
    job = _Job(corpus, folder / "job", keys)
    found = []
    for turn in range(number + aimed):
        if turn < number:
            step, writing = job.kill(moments.uniform(0.0, 4.0))
        else:
            step, writing = job.kill_in_save(moments.uniform(0.0, 0.3))
        newest, broken = job.newest()
        found.append((step, writing, newest, broken))
    job.kill(0.0)  # the start after the last kill
    whole = _Job(corpus, folder / "whole", keys)
    whole.kill_after(max(line["step"] for line in job.notes()))
    expected = {(line["rank"], line["step"]): line for line in whole.notes()}
    wrong = [line["step"] for line in job.notes() if line != expected[line["rank"], line["step"]]]
    for (step, writing, newest, broken), resumed in zip(found, job.resumed[1:], strict=True):
        otherwise = [s for s in wrong if s > _step(newest)]
        yield Kill(layout, step, writing, newest, resumed, broken or (f"step {otherwise[0]}" if otherwise else ""))


class _Job:
    """A job that is started, killed and started again in one folder."""

    def __init__(self, corpus: Path, folder: Path, keys: tuple[str, ...]) -> None:
        folder.mkdir(parents=True)
        self.folder, self._arguments = folder, [*tiny(corpus, folder), *keys]
        self.resumed: list[str] = []
        self._notes = folder.with_name(f"{folder.name}_notes")  # what lies in the job's folder NeMo moves at each start

    def kill(self, seconds: float) -> tuple[int, bool]:
        """Start, kill `seconds` after the first step; the last step done and whether a checkpoint was being written."""
        before = len(self.notes())
        return self._run(lambda: len(self.notes()) > before, seconds)

    def kill_in_save(self, seconds: float) -> tuple[int, bool]:
        """Start, kill `seconds` after the second save of this start has begun, or after what is done in it."""
        before, seen = len(self.notes()), set()

        def saving() -> bool:
            seen.update(path.name for path in self._saves().glob("*.incomplete") if len(self.notes()) > before)
            return len(seen) > 1

        return self._run(saving, seconds)

    def kill_after(self, step: int) -> None:
        """Start, kill when every rank has done a step."""
        ranks = 1 + any("devices=2" in key for key in self._arguments)
        self._run(lambda: sum(line["step"] >= step for line in self.notes()) >= ranks, 0.0)

    def _run(self, reached: Any, seconds: float) -> tuple[int, bool]:
        log = self.folder.with_suffix(f".{len(self.resumed)}.log")
        with log.open("w") as output:
            process = start(
                SCRIPT,
                self._arguments,
                environment={"NOTES": str(self._notes)},
                cwd=self.folder,
                output=output,
            )
            deadline, done = time.monotonic() + SECONDS, len(self.notes())
            while not reached():
                if (now := len(self.notes())) > done:  # it goes on, however slowly
                    deadline, done = time.monotonic() + SECONDS, now
                if process.poll() is not None or time.monotonic() > deadline:
                    _end(process)
                    raise SystemExit(f"resume: the job ended by itself:\n{log.read_text()[-3000:]}")
                time.sleep(0.01)
            time.sleep(seconds)
            _end(process)
        self.resumed.append(Run(-signal.SIGKILL, log.read_text(), self.folder).resumed_from)
        return max(line["step"] for line in self.notes()), any(self._saves().glob("*.incomplete"))

    def newest(self) -> tuple[str, str]:
        """The newest checkpoint that stands under its own name, and one of those that cannot be read whole."""
        named = [path for path in self._saves().glob("*") if path.is_dir() and path.suffix != ".incomplete"]
        whole = [path for path in named if not path.with_name(path.name + "-unfinished").exists()]
        broken = ""
        for path in whole:
            try:
                read_tensors(path)
                ranks = json.loads((path / "metadata.json").read_text()) and list(path.glob("rng/rank_*"))
            except Exception as error:  # whatever a reader says of half a checkpoint
                broken = f"{path.name}: {type(error).__name__}"
            else:
                broken = broken if ranks else f"{path.name}: no random states"
        return max((path.name for path in whole), key=_step, default=""), broken

    def notes(self) -> list[dict[str, Any]]:
        """The lines of all ranks, those that a kill cut short left out."""
        found = []
        for file in sorted(self._notes.parent.glob(f"{self._notes.name}.*")):
            for text in file.read_text().splitlines():
                try:
                    found.append({"rank": file.suffix, **json.loads(text)})
                except json.JSONDecodeError:
                    continue
        return found

    def _saves(self) -> Path:
        return self.folder / "checkpoints"


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _step(name: str) -> int:
    found = re.search(r"step=(\d+)", name)
    return int(found[1]) if found else 0
