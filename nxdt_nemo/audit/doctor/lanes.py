"""Which lanes this machine can run, and the one that `accelerator=neuron` takes.

Room audit/. Uses runtime/; starts no device. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from nxdt_nemo.audit.doctor.row import Row
from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.select import lane_classes, select

__all__ = ["rows"]

SECTION = "lanes"


def rows() -> Iterator[Row]:
    """A row for each lane, with every obstacle, and the choice."""
    for name, lane in lane_classes().items():
        asked, unasked = lane.probe(asked=True), lane.probe()
        if asked.usable and not unasked.usable:
            yield Row(SECTION, name, f"usable when asked for; by itself not: {unasked.reason}")
        else:
            yield Row(SECTION, name, f"{'usable' if asked.usable else 'not usable'}: {asked.reason}")
    try:
        lane_taken, reason = select()
    except LaneError as error:
        yield Row(SECTION, "accelerator=neuron", f"{error.place}: {error.reason}", "problem", error.fix)
    else:
        yield Row(SECTION, "accelerator=neuron", f"takes {lane_taken.name} ({reason})")
