"""Variants of a step, each in a process of its own, that take turns: for step.py and xla_step.py.

A variant's program steps whenever it gets a line. It answers when it is ready, and after each step: with a line that
begins with BENCH and holds JSON (`answer`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAME_LOSS = 2e-5  # relative, over the first steps, between any two variants
_MARK = "BENCH "


def answer(found: dict[str, Any]) -> None:
    """What a variant's program says."""
    print(_MARK + json.dumps(found), flush=True)


class Worker:
    """One variant in a process that steps when it is told to.

    program      the arguments of python
    environment  beside this process's own
    core         the processor core that all of its threads are held to; None: any
    """

    def __init__(self, program: Sequence[str], environment: Mapping[str, str], core: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *program],
            env=os.environ | environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        self.about = self._answer()

    def step(self) -> dict[str, float]:
        """What the program measured in one step, and its loss."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return dict(json.loads(line.removeprefix(_MARK)))
        raise SystemExit(f"a worker ended with {self._process.wait(60)}")


def write_weights(program: Sequence[str]) -> None:
    """Run the program that writes the weights of all variants, by stock megatron-core."""
    subprocess.run(
        [sys.executable, *program],
        env=os.environ | {"NXDT_NEMO": "0", "TORCHDYNAMO_DISABLE": "1"},
        check=True,
        cwd=ROOT,
    )


def in_turn(workers: Mapping[str, Worker], turns: int) -> dict[str, list[dict[str, float]]]:
    """Steps by variant, every second turn in the other order; the workers end."""
    names = list(workers)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names if turn % 2 == 0 else names[::-1]:
            steps[name].append(workers[name].step())
    for worker in workers.values():
        worker.close()
    return steps


def check_losses(steps: Mapping[str, list[dict[str, float]]], name: str, count: int) -> None:
    """Exits unless the first losses of all variants are those of the named one, within SAME_LOSS."""
    losses = {other: [step["loss"] for step in taken[:count]] for other, taken in steps.items()}
    for other, theirs in losses.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses[name], theirs, strict=True))
        if worst > SAME_LOSS:
            raise SystemExit(f"{other} does not train the same model: losses {theirs}, ours {losses[name]}")
