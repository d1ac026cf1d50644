"""Choosing the lane: NXDT_NEMO_RUNTIME=auto|cpu|xla|neuron.

Room runtime/. Imports no torch. Proof: tests/runtime/test_select.py.
"""

from __future__ import annotations

import os

from nxdt_nemo import console
from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.lane import Lane

__all__ = ["VARIABLE", "current", "forget", "lane_classes", "select"]

VARIABLE = "NXDT_NEMO_RUNTIME"
_current: Lane | None = None


def lane_classes() -> dict[str, type[Lane]]:
    """Lanes by name, best first."""
    from nxdt_nemo.runtime.cpu import CpuLane
    from nxdt_nemo.runtime.neuron import NeuronLane
    from nxdt_nemo.runtime.xla import XlaLane

    return {lane.name: lane for lane in (NeuronLane, XlaLane, CpuLane)}


def select(name: str | None = None) -> tuple[Lane, str]:
    """The lane to use and the reason, `name` or the environment's wish taken first.

    Raises LaneError for an unknown lane, or for one that this machine cannot run.
    """
    asked = name or os.environ.get(VARIABLE) or "auto"
    place = f"runtime={asked}" if name else f"{VARIABLE}={asked}"
    lanes = lane_classes()
    if asked == "auto":
        verdicts = {key: lane.probe() for key, lane in lanes.items()}
        best = next(key for key, verdict in verdicts.items() if verdict.usable)
        reasons = [f"{key}: {verdict.reason}" for key, verdict in verdicts.items() if not verdict.usable]
        if best != "cpu":
            reasons.insert(0, verdicts[best].reason)
        return lanes[best](), "; ".join(reasons)
    if asked not in lanes:
        raise LaneError(f"{asked!r} is not a lane", place=place, fix="use auto, cpu, xla or neuron")
    verdict = lanes[asked].probe(asked=True)
    if not verdict.usable:
        raise LaneError(verdict.reason, place=place, fix="use cpu or auto meanwhile")
    return lanes[asked](), f"asked for by {place}"


def current() -> Lane:
    """This process's lane; the first call selects it and says so on rank 0."""
    global _current
    if _current is None:
        _current, reason = select()
        console.once(f"lane {_current.name} ({reason})", key="lane")
    return _current


def forget() -> None:
    """Let the next current() select anew (deactivation, tests)."""
    global _current
    _current = None
