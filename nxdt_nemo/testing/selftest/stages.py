"""The stages of the self-test, in order: each says in a line what it found, and whether that is as it has to be.

Room testing/. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nxdt_nemo.config.environment import apply, settings
from nxdt_nemo.config.instances import INSTANCES
from nxdt_nemo.config.job import Job
from nxdt_nemo.runtime.machine import product_name
from nxdt_nemo.testing.ours import ACTIVE
from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.pool import RankError, RankPool
from nxdt_nemo.testing.script_run import Run
from nxdt_nemo.testing.selftest.training import SAVED, STEPS, Runs

__all__ = ["STAGES", "Outcome", "run"]

PIECES = "nxdt_nemo.testing.selftest.pieces"
# Largest error over the largest element; bfloat16 has 8 bits.
EXACT = {"float32": 1e-5, "bfloat16": 1e-2}
SAME = 1e-5
SECONDS = 600.0  # of all stages together
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
    """What stages share: a folder, a lane, the time that is left, and the runs that later stages compare with."""

    def __init__(self, folder: Path, lane: str, seconds: float) -> None:
        self.ends = time.monotonic() + seconds
        # One core for a process: the runtime takes all of them otherwise, and a second rank finds none.
        self.environment = {"NEURON_RT_NUM_CORES": "1"}
        self.lane, self.runs = lane, Runs(folder, lane, self.environment)
        self.first: Run | None = None

    @property
    def left(self) -> float:
        """Seconds, at least one: what has been started ends by its own time-out."""
        return max(1.0, self.ends - time.monotonic())

    def train(self, name: str, *overrides: str, lane: str = "", stop: int = -1) -> Run:
        """Runs.train in the time that is left."""
        return self.runs.train(name, *overrides, lane=lane, stop=stop, seconds=self.left)

    def ranks(self, world: int, piece: str) -> list[dict[str, object]]:
        """piece() in `world` ranks of the lane, with the environment of a float32 job: neuronx-cc would cast."""
        job = Job(precision="fp32", lane=self.lane, instance=INSTANCES.get(product_name()))
        apply(settings(job), whole := dict(os.environ))
        environment = {name: value for name, value in whole.items() if os.environ.get(name) != value}
        environment |= self.environment | {"NXDT_NEMO_RUNTIME": self.lane, "NXDT_NEMO": "0"}
        with RankPool(world, env=environment, init=ACTIVE, group=False, timeout=self.left) as pool:
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
    text = ", ".join(f"{name} {max(errors):.1e}" for name, errors in found.items())  # type: ignore[call-overload]
    wrong = [
        name
        for name, errors in found.items()
        if not all(error <= EXACT[name] for error in errors)  # type: ignore[attr-defined]
    ]
    if "float32" not in found:
        raise Failed("the lane supports no float32")
    if wrong:
        raise Failed(f"errors {text}: {' and '.join(wrong)} computed with fewer bits than it has")
    return f"errors {text}"


def collectives(bench: _Bench) -> str:
    """Two ranks' collectives give what they have to."""
    found = bench.ranks(2, "collective_errors")
    wrong = sorted({name for one in found for name, error in one.items() if error})
    if wrong:
        raise Failed(f"wrong on 2 ranks: {', '.join(wrong)}")
    return f"2 ranks: {', '.join(found[0])} exact"


def one_step(bench: _Bench) -> str:
    """NeMo trains a tiny Llama for one step, optimizer and logging included."""
    alone = ("trainer.max_steps=1", "trainer.val_check_interval=1", "exp_manager.create_checkpoint_callback=false")
    done = bench.train("step", *alone)
    losses = _losses(done, 1)
    return f"loss {losses[0]:.4f}"


def parity(bench: _Bench) -> str:
    """Losses of the lane equal the cpu lane's, at a learning rate that learns."""
    saving = f"trainer.val_check_interval={SAVED}"
    found = bench.first = bench.train("lane", saving)
    losses = _losses(found, STEPS)
    if bench.lane == "cpu":
        again = bench.train("again", *NO_CHECKPOINTS)
        other, name = _losses(again, STEPS), "a second run"
    else:
        again = bench.train("cpu", *NO_CHECKPOINTS, lane="cpu")
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
    _losses(bench.train("resumed", half, stop=SAVED), SAVED)
    resumed = bench.train("resumed", half)
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
    """The losses of a run that ended well. Raises Failed with the end of its output otherwise."""
    if done.code != 0:
        raise Failed(f"exit code {done.code}", done.output)
    curve = done.curve()
    if len(curve) != steps:
        raise Failed(f"{len(curve)} of {steps} losses logged", done.output)
    losses = [curve[step] for step in sorted(curve)]
    bad = [step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    if bad:
        raise Failed(f"the loss of step {bad[0]} is {losses[bad[0] - 1]}", done.output)
    return losses


def run(
    folder: Path, lane: str, stages: dict[str, Callable[[_Bench], str]] | None = None, seconds: float = SECONDS
) -> Iterator[Outcome]:
    """Each stage's outcome as it ends; without a device the rest is not tried, nor when all have taken `seconds`."""
    bench = _Bench(folder, lane, seconds)
    lost = ""
    for name, stage in (STAGES if stages is None else stages).items():
        if lost:
            yield Outcome(name, False, f"not tried: {lost}", 0.0)
            continue
        started = time.monotonic()
        try:
            ok, found, output = True, stage(bench), ""
        except Failed as error:
            ok, found, output = False, str(error.args[0]), str(error.args[1]) if len(error.args) > 1 else ""
        except RankError as error:
            last = str(error).strip().splitlines()[-1]
            ok, found, output = False, f"rank {error.rank}: {last}", str(error)
        except subprocess.TimeoutExpired as error:
            ok, found, output = False, f"not done after {error.timeout:.0f} s", str(error.output or "")
        yield Outcome(name, ok, found, time.monotonic() - started, "" if ok else output[-4000:])
        if name == "device" and not ok:
            lost = "no device"
        elif time.monotonic() >= bench.ends:
            lost = f"the {seconds:.0f} s of all stages are over; what was compiled is kept, start it again"
