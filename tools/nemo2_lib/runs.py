"""Runs of scripts that use NeMo 2.0, and what they say of each step's loss."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo2_lib.inputs import Inputs
from nxdt_nemo.testing.script_run import OURS, run

__all__ = ["LOSS", "Done", "Runs"]

OWN = Path(__file__).parent
STOCK = Path("tests", "collections", "llm")
SECONDS = 580
LOSS = re.compile(r"reduced_train_loss: (\S+)")


@dataclass(frozen=True)
class Done:
    """A run that ended as it may: each step's loss, in full digits where our script wrote them; how long it took."""

    losses: Sequence[float]
    seconds: float
    code: int = 0


@dataclass(frozen=True)
class Runs:
    """Runs in folders below one. `checkout`: of NeMo."""

    inputs: Inputs
    checkout: Path
    folder: Path

    def start(self, script: str, words: str, folder: Path, ends: str = "") -> Done:
        """A script by its name: one of ours, one of the checkout's, or the command `nemo`.

        words  its arguments; {folder} is its own, {inputs} that of the inputs, {checkout} NeMo's
        ends   what a run may say that fails
        Raises RuntimeError with the last lines of any other that does.
        """
        folder.mkdir(parents=True, exist_ok=True)
        named = {"folder": folder, "inputs": self.inputs.folder, "checkout": self.checkout}
        arguments = words.format(**named).split()
        command, environment = OURS, self.inputs.environment
        if script == "nemo":
            command, environment = (), environment | {"NXDT_NEMO": "1"}
        began = time.monotonic()
        ended = run(
            self._path(script), arguments, folder, seconds=SECONDS, command=command, environment=environment, cwd=folder
        )
        if ended.code and not (ends and ends in ended.output):
            last = "\n".join(ended.output.splitlines()[-25:])
            raise RuntimeError(f"{script} {words}: exit code {ended.code}\n{last}")
        exact = folder / "losses.json"
        losses = json.loads(exact.read_text()) if exact.exists() else [float(x) for x in LOSS.findall(ended.output)]
        return Done(losses, time.monotonic() - began, ended.code)

    def copy(self, source: Path, target: Path) -> Path:
        """A folder with what another run has saved, and nothing else."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, symlinks=True)
        (target / "losses.json").unlink(missing_ok=True)
        return target

    def _path(self, script: str) -> Path:
        if script == "nemo":
            return Path(sys.executable).with_name("nemo")
        own = OWN / script
        return own if own.exists() else self.checkout / STOCK / script
