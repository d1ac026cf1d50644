"""The stages of the self-test, in order: each says in a line what it found, and whether that is as it has to be.

Room testing/. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.config.environment import apply, settings
from nxdt_nemo.config.instances import INSTANCES
from nxdt_nemo.config.job import Job
from nxdt_nemo.runtime.machine import product_name
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.pool import RankError, RankPool
from nxdt_nemo.testing.script_run import Run
from nxdt_nemo.testing.selftest.training import SAVED, STEPS, Runs

__all__ = ["BUDGET", "STAGES", "Outcome", "run"]

BUDGET = 600.0
"""Seconds that all stages have together."""

PIECES = "nxdt_nemo.testing.selftest.pieces"
# Largest error over the largest element; bfloat16 has 8 bits.
EXACT = {"float32": 1e-5, "bfloat16": 1e-2}
SAME = 1e-5
UNTRAINED = math.log(1024)  # the loss of a model to which all pieces of the corpus's tokenizer are alike
NO_CHECKPOINTS = ("exp_manager.create_checkpoint_callback=false", f"trainer.val_check_interval={STEPS}")


class Failed(Exception):
    """A stage whose result is wrong: its first argument says which."""


@dataclass(frozen=True)
class Outcome:
    """One stage: what it found in a line, whether that is right, and the end of its output when it is not."""

    stage: str
    ok: bool
    found: str
    seconds: float
    output: str = ""


class _Bench:
    """What stages share: a folder, a lane, the time, and the runs that later stages compare with."""

    def __init__(self, folder: Path, lane: str) -> None:
        self._end = time.monotonic() + BUDGET
        # One core for a process: the runtime takes all of them otherwise, and a second rank finds none.
        self.environment = {"NEURON_RT_NUM_CORES": "1"}
        self.lane, self.runs = lane, Runs(folder, lane, self.environment, self.left)
        self.first: Run | None = None

    def left(self) -> float:
        """Seconds until the end of the budget. Raises Failed when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise Failed(f"nothing is left of the stages' {BUDGET:.0f} s; compiled graphs are kept: start again")
        return left

    def ranks(self, world: int, piece: str) -> list[dict[str, Any]]:
        """piece() in `world` ranks of the lane, with the environment of a float32 job: neuronx-cc would cast."""
        job = Job(precision="fp32", lane=self.lane, instance=INSTANCES.get(product_name()))
        apply(settings(job), whole := dict(os.environ))
        environment = {name: value for name, value in whole.items() if os.environ.get(name) != value}
        environment |= self.environment | {"NXDT_NEMO_RUNTIME": self.lane, "NXDT_NEMO": "0"}
        with RankPool(world, env=environment, init=ACTIVE, group=False, timeout=self.left()) as pool:
            return pool.run(f"{PIECES}:{piece}")


def device(bench: _Bench) -> str:
    """The lane's device answers."""
    (found,) = bench.ranks(1, "device")
    if not found["back"]:
        raise Failed("numbers did not come back from the device as they were sent")
    gib = int(str(found["memory"])) / 2**30
    return f"lane {found['lane']}, {found['device']} ({found['type']}), {found['count']} here, {gib:.1f} GiB"


def dtypes(bench: _Bench) -> str:
    """Products and softmax in the dtypes that train, against float64 on the host."""
    (found,) = bench.ranks(1, "dtype_errors")
    if "float32" not in found:
        raise Failed("float32, in which the later stages train, is not supported")
    worst = {name: _worst(errors) for name, errors in found.items()}
    text = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    wrong = [name for name, error in worst.items() if error > EXACT[name]]
    if wrong:
        raise Failed(f"errors {text}: {' and '.join(wrong)} computed with fewer bits than it has")
    return f"errors {text}"


def _worst(errors: Iterable[float]) -> float:
    """The largest; infinite when one is not a number, which max() may pass over."""
    return max(error if math.isfinite(error) else math.inf for error in errors)


def collectives(bench: _Bench) -> str:
    """Two ranks' collectives give what they have to."""
    found = bench.ranks(2, "collective_errors")
    names = set().union(*found)
    if not names or any(one.keys() != names for one in found):
        raise Failed(f"a rank did not tell what it got: {' and '.join(str(sorted(one)) for one in found)}")
    wrong = sorted({name for one in found for name, error in one.items() if error})
    if wrong:
        raise Failed(f"wrong on 2 ranks: {', '.join(wrong)}")
    return f"2 ranks: {', '.join(found[0])} exact"


def one_step(bench: _Bench) -> str:
    """NeMo trains a tiny Llama for one step, optimizer and logging included."""
    alone = ("trainer.max_steps=1", "trainer.val_check_interval=1", "exp_manager.create_checkpoint_callback=false")
    done = bench.runs.train("step", *alone)
    (loss,) = _losses(done, 1)
    if abs(loss - UNTRAINED) > 0.5:
        raise Failed(f"loss {loss:.4f}: an untrained model's is near {UNTRAINED:.1f}", done.output)
    return f"loss {loss:.4f}"


def parity(bench: _Bench) -> str:
    """Losses of the lane equal the cpu lane's, at a learning rate that learns."""
    saving = f"trainer.val_check_interval={SAVED}"
    found = bench.first = bench.runs.train("lane", saving)
    losses = _losses(found, STEPS)
    if bench.lane == "cpu":
        again = bench.runs.train("again", *NO_CHECKPOINTS)
        other, name = _losses(again, STEPS), "a second run"
    else:
        again = bench.runs.train("cpu", *NO_CHECKPOINTS, lane="cpu")
        other, name = _losses(again, STEPS), "the cpu lane"
    worst = relative(losses, other)
    text = f"{STEPS} steps, {losses[0]:.4f} to {losses[-1]:.4f}, {worst:.1e} from {name}"
    if worst > SAME:
        raise Failed(f"{text}: more than {SAME:.0e}")
    return text


def resume(bench: _Bench) -> str:
    """A run that was saved and stopped goes on as one that was not."""
    if bench.first is None:
        raise Failed("the run to compare with did not end")
    half = f"trainer.val_check_interval={SAVED}"
    _losses(bench.runs.train("resumed", half, stop=SAVED), SAVED)
    resumed = bench.runs.train("resumed", half)
    found, whole = _losses(resumed, STEPS), _losses(bench.first, STEPS)
    if not resumed.resumed_from:
        raise Failed("the second run began anew")
    worst = relative(found, whole)
    if worst > SAME:
        raise Failed(f"{worst:.1e} from the run that was not stopped")
    return f"saved at step {SAVED}, resumed to {STEPS}, {worst:.1e} from the run that was not stopped"


STAGES: dict[str, Callable[[_Bench], str]] = {
    "device": device,
    "dtypes": dtypes,
    "collectives": collectives,
    "one step": one_step,
    "parity": parity,
    "save and resume": resume,
}


def _losses(done: Run, steps: int) -> list[float]:
    """The losses of a run that ended well, each above 0. Raises Failed with the end of its output otherwise."""
    if done.code != 0:
        raise Failed(f"exit code {done.code}", done.output)
    curve = done.curve()
    if len(curve) != steps:
        raise Failed(f"{len(curve)} of {steps} losses logged", done.output)
    for step, loss in sorted(curve.items()):
        if not 0 < loss < math.inf:
            raise Failed(f"loss {loss} in step {step + 1}", done.output)
    return [curve[step] for step in sorted(curve)]


def run(folder: Path, lane: str, stages: dict[str, Callable[[_Bench], str]] | None = None) -> Iterator[Outcome]:
    """Each stage's outcome as it ends; without a device, or once the time is over, the rest is not tried."""
    bench = _Bench(folder, lane)
    lost = False
    for name, stage in (STAGES if stages is None else stages).items():
        if lost:
            yield Outcome(name, False, "not tried: no device", 0.0)
            continue
        started = time.monotonic()
        try:
            bench.left()
            ok, found, output = True, stage(bench), ""
        except Failed as error:
            ok, found, output = False, str(error.args[0]), str(error.args[1]) if len(error.args) > 1 else ""
        except RankError as error:
            last = str(error).strip().splitlines()[-1]
            late = f"not done after {time.monotonic() - started:.0f} s"
            ok, found, output = False, late if error.kind == "timeout" else f"rank {error.rank}: {last}", str(error)
        except subprocess.TimeoutExpired as error:
            ok, found, output = False, f"not done after {error.timeout:.0f} s", _text(error.output)
        yield Outcome(name, ok, found, time.monotonic() - started, "" if ok else output[-4000:])
        lost = name == "device" and not ok


def _text(output: str | bytes | None) -> str:
    """Of a process that was ended: subprocess gives bytes there, whatever was asked for."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
