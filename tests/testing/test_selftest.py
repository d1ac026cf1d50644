"""The self-test: what its stages say of a machine that is well and of one that is not, and its report."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from nxdt_nemo.testing.pool import RankError
from nxdt_nemo.testing.script_run import Run
from nxdt_nemo.testing.selftest import Outcome, run, stages, training
from nxdt_nemo.testing.selftest.report import markdown
from nxdt_nemo.testing.selftest.stages import STAGES, Failed


def outcomes(tmp_path, **stages):
    return [(one.stage, one.ok, one.found) for one in run(tmp_path, "cpu", stages)]


def fails(bench):
    raise Failed("7 of 9", "the output")


def hangs(bench):
    raise subprocess.TimeoutExpired("x", 3, "half a line")


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path):
    found = outcomes(tmp_path, dtypes=fails, collectives=hangs, parity=lambda bench: "well")
    assert found == [
        ("dtypes", False, "7 of 9"),
        ("collectives", False, "not done after 3 s"),
        ("parity", True, "well"),
    ]


def test_without_a_device_nothing_else_is_tried(tmp_path):
    found = outcomes(tmp_path, device=fails, dtypes=lambda bench: "well")
    assert found[1] == ("dtypes", False, "not tried: no device")


@dataclass(frozen=True)
class Logged(Run):
    """A run that ended well and logged these losses."""

    losses: Sequence[float] = ()

    def curve(self, name="reduced_train_loss"):
        return dict(enumerate(self.losses))

    @property
    def resumed_from(self):
        return "a checkpoint"


@pytest.fixture
def losses(monkeypatch):
    """losses(**runs) are what each run of the self-test logs; a run that is not named logs LEARNS."""

    def give(**runs):
        def train(self, name, *overrides, lane="", stop=-1):
            steps = 1 if name == "step" else stop if stop > 0 else len(LEARNS)
            return Logged(0, "", self.folder, runs.get(name, LEARNS)[:steps])

        monkeypatch.setattr(stages.Runs, "train", train)

    return give


LEARNS = [6.9375, 6.9, 6.8, 6.7, 6.5, 6.25]
NAMES = {name: STAGES[name] for name in ("one step", "parity", "save and resume")}


def test_losses_that_are_as_they_should_be(losses, tmp_path):
    losses()
    assert [(one.stage, one.ok) for one in run(tmp_path, "xla", NAMES)] == [(name, True) for name in NAMES]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0], ids=str)
@pytest.mark.parametrize(
    "which, stage, step",
    [
        ("step", "one step", 0),
        ("lane", "parity", 0),
        ("lane", "parity", 5),
        ("cpu", "parity", 4),
        ("resumed", "save and resume", 5),
    ],
)
def test_a_loss_that_is_none(losses, tmp_path, which, stage, step, loss):
    losses(**{which: [*LEARNS[:step], loss, *LEARNS[step + 1 :]]})
    found = {one.stage: one for one in run(tmp_path, "xla", NAMES)}
    assert not found[stage].ok
    assert found[stage].found == f"loss {loss} in step {step + 1}"


def test_a_first_loss_of_a_model_that_knows_more_than_it_can(losses, tmp_path):
    losses(step=[1.5])
    (found,) = run(tmp_path, "xla", {"one step": STAGES["one step"]})
    assert (found.ok, found.found) == (False, "loss 1.5000: an untrained model's is near 6.9")


@pytest.mark.parametrize(
    "errors, line",
    [
        ({"float32": (1e-7, 1e-8), "bfloat16": (1e-3, 1e-3)}, ""),
        ({"float32": (1e-7, math.nan)}, "errors float32 inf: float32 computed with fewer bits than it has"),
        ({"float32": (math.nan, 1e-7)}, "errors float32 inf: float32 computed with fewer bits than it has"),
        ({"bfloat16": (1e-3, 1e-3)}, "float32, in which the later stages train, is not supported"),
        ({}, "float32, in which the later stages train, is not supported"),
    ],
)
def test_dtypes(monkeypatch, tmp_path, errors, line):
    monkeypatch.setattr(stages._Bench, "ranks", lambda *_: [errors])
    (found,) = run(tmp_path, "xla", {"dtypes": STAGES["dtypes"]})
    assert (found.ok, "" if found.ok else found.found) == (not line, line)


def test_a_collective_that_gives_nan(monkeypatch, tmp_path):
    monkeypatch.setattr(stages._Bench, "ranks", lambda *_: [{"all_reduce": 0.0, "broadcast": math.nan}] * 2)
    (found,) = run(tmp_path, "xla", {"collectives": STAGES["collectives"]})
    assert (found.ok, found.found) == (False, "wrong on 2 ranks: broadcast")


@pytest.mark.parametrize("found", [[{}, {}], [{"all_reduce": 0.0}, {}], [{}, {"all_reduce": 0.0}]])
def test_a_rank_that_tells_nothing_of_its_collectives(monkeypatch, tmp_path, found):
    monkeypatch.setattr(stages._Bench, "ranks", lambda *_: found)
    (stage,) = run(tmp_path, "xla", {"collectives": STAGES["collectives"]})
    assert not stage.ok and stage.found.startswith("a rank did not tell what it got")


def test_stages_share_the_time(monkeypatch, tmp_path):
    """What a stage may take is what those before it have left; the last finds nothing."""
    clock, given = [100.0], []

    @contextlib.contextmanager
    def pool(world, *, timeout, **more):
        given.append(timeout)
        clock[0] += 250
        raise RankError(0, "timeout", "stacks")
        yield

    def train(*arguments, seconds, **more):
        given.append(seconds)
        clock[0] += seconds
        raise subprocess.TimeoutExpired("x", seconds, b"half a line")

    monkeypatch.setattr(stages, "RankPool", pool)
    monkeypatch.setattr(training, "run", train)
    monkeypatch.setattr(training, "write_corpus", lambda folder: folder)
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    found = list(run(tmp_path, "xla", {name: STAGES[name] for name in ("dtypes", "collectives", "one step", "parity")}))
    assert given == [600, 350, 100]
    assert [(one.ok, one.seconds, one.found) for one in found] == [
        (False, 250, "not done after 250 s"),
        (False, 250, "not done after 250 s"),
        (False, 100, "not done after 100 s"),
        (False, 0, "nothing is left of the stages' 600 s; compiled graphs are kept: start again"),
    ]
    assert found[2].output == "half a line"
    assert ", 600 of 600 s\n" in markdown(found, "xla", [])


@pytest.mark.ranks
def test_a_lane_that_is_not_there_is_a_failed_stage(tmp_path):
    (found,) = list(run(tmp_path, "neuron", {"device": STAGES["device"]}))
    assert not found.ok
    assert "torch" in found.found


def test_ranks_have_the_environment_of_a_float32_job(monkeypatch, tmp_path):
    """neuronx-cc casts float32 products to bfloat16 unless it is told not to."""
    found = {}

    @contextlib.contextmanager
    def pool(world, *, env, **more):
        found.update(env)
        raise Failed("seen")
        yield

    monkeypatch.setattr(stages, "RankPool", pool)
    monkeypatch.setattr(stages, "product_name", lambda: "trn2.48xlarge")
    monkeypatch.setenv("NEURON_CC_FLAGS", "--verbose info")
    assert [one.found for one in run(tmp_path, "xla", {"dtypes": STAGES["dtypes"]})] == ["seen"]
    assert found["NEURON_CC_FLAGS"].startswith("--verbose info ")
    assert "--auto-cast none" in found["NEURON_CC_FLAGS"]
    assert found["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert "PATH" not in found  # of this process: a rank's own place comes from the pool


def test_the_report(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    made = [Outcome("device", True, "a | b", 1.2), Outcome("parity", False, "2e-1", 3.0, "in /home/somebody/x")]
    text = markdown(made, "xla", ["| state |"])
    assert text.startswith("# nxdt-nemo self-test: 1 of 2 stages failed\n")
    assert "| device | passed | 1 | a \\| b |" in text
    assert "in ~/x" in text
    assert "somebody" not in text
    assert text.rstrip().endswith("| state |")


def test_a_report_that_cannot_be_written_is_said_before_the_first_stage(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nxdt_nemo.testing.selftest", "--output", str(tmp_path / "absent" / "x.md")],
        env=os.environ | {"NXDT_NEMO_RUNTIME": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("absent/x.md: cannot be written: No such file or directory")
    assert "passed" not in done.stdout


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lane", ["cpu", "xla"])
def test_this_machine(request, tmp_path, lane):
    if lane == "xla":
        request.getfixturevalue("with_torch_xla")
    done = subprocess.run(
        [sys.executable, "-m", "nxdt_nemo", "doctor", "--on-device"],
        env=os.environ | {"NXDT_NEMO_RUNTIME": lane},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    states = re.findall(r"^(passed|FAILED)", done.stdout, re.MULTILINE)
    assert states == ["passed"] * len(STAGES)
    assert (tmp_path / "nxdt-nemo-selftest.md").read_text().startswith("# nxdt-nemo self-test: all 6 stages passed")
