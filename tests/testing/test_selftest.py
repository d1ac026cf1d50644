"""The self-test: what its stages say of a machine that is well and of one that is not, and its report."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys

import pytest

from nxdt_nemo.testing.selftest import Outcome, run, stages
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


def test_time_is_shared_by_all_stages(tmp_path):
    def slow(bench):
        assert bench.left == 1.0  # less is left: it ends by a time-out of a second
        return "well"

    found = [(one.stage, one.ok, one.found) for one in run(tmp_path, "cpu", {"dtypes": slow, "parity": slow}, 0.0)]
    late = "not tried: the 0 s of all stages are over; what was compiled is kept, start it again"
    assert found == [("dtypes", True, "well"), ("parity", False, late)]


class Curve:
    """A run whose losses are these."""

    code, output, resumed_from = 0, "the output", "step=3"

    def __init__(self, losses):
        self.losses = losses

    def curve(self):
        return dict(enumerate(self.losses))


NAN = float("nan")


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("one step", "the loss of step 1 is nan"),
        ("parity", "the loss of step 4 is nan"),
        ("save and resume", "the run to compare with did not end"),
    ],
)
def test_a_loss_that_is_no_number_is_a_failed_stage(monkeypatch, tmp_path, stage, says):
    losses = [NAN] if stage == "one step" else [3.0, 2.0, 1.0, NAN, 1.0, 1.0]
    monkeypatch.setattr(stages.Runs, "train", lambda *_, **__: Curve(losses))
    assert outcomes(tmp_path, **{stage: STAGES[stage]}) == [(stage, False, says)]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"float32": (1e-7, 1e-7), "bfloat16": (1e-3, NAN)}, "errors float32 1.0e-07, bfloat16"),
        ({"float32": (NAN, 1e-7)}, "errors float32 nan"),
        ({"bfloat16": (1e-3, 1e-3)}, "the lane supports no float32"),
    ],
)
def test_dtypes_that_give_no_number_fail(monkeypatch, tmp_path, found, says):
    monkeypatch.setattr(stages._Bench, "ranks", lambda *_: [found])
    [(_, ok, said)] = outcomes(tmp_path, dtypes=STAGES["dtypes"])
    assert not ok and said.startswith(says)


def test_without_a_device_nothing_else_is_tried(tmp_path):
    found = outcomes(tmp_path, device=fails, dtypes=lambda bench: "well")
    assert found[1] == ("dtypes", False, "not tried: no device")


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
    assert sum(map(int, re.findall(r" (\d+) s  ", done.stdout))) < stages.SECONDS
    assert (tmp_path / "nxdt-nemo-selftest.md").read_text().startswith("# nxdt-nemo self-test: all 6 stages passed")
