"""What a target has, and the environment that a run gets there: `nxdt-nemo doctor --target`.

Room audit/. Data of config/, put into rows. Proof: tests/cli/test_doctor_target.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, get_args

from nxdt_nemo.config.environment import Where, refused, settings
from nxdt_nemo.config.instances import Instance
from nxdt_nemo.config.job import Job, Precision

__all__ = ["EnvironmentRow", "FigureRow", "environment", "figures"]

GIB, GB, TFLOP = 2**30, 1e9, 1e12


class FigureRow(NamedTuple):
    """A figure of the instance's, and of one rank's share of it."""

    what: str
    instance: str
    rank: str
    source: str


class EnvironmentRow(NamedTuple):
    """A variable: its value, when it is set (process, launch, nodes, compile; in brackets by which launchers only), who
    says so, why and where that is published."""

    variable: str
    value: str
    when: str
    by: str
    reason: str
    source: str


def figures(target: Instance, lnc: int | None = None) -> Iterator[FigureRow]:
    """The published figures, at an LNC."""
    core, cores, chips = target.core(lnc), target.cores(lnc), target.chips
    flops = target.chip.flops
    yield FigureRow("chips", f"{chips} {target.chip.name}", "", target.source)
    yield FigureRow("ranks", f"{cores} at LNC {target.checked(lnc)}", "1", target.chip.source)
    yield FigureRow("memory", f"{chips * target.chip.hbm / GIB:,.0f} GiB", f"{core.hbm / GIB:.0f} GiB", target.source)
    bandwidth = chips * target.chip.hbm_bandwidth
    yield FigureRow("its bandwidth", _rate(bandwidth), _rate(core.hbm_bandwidth), target.chip.source)
    for dtype, peak in flops.items():
        whole, share = chips * peak / TFLOP, core.flops[dtype] / TFLOP
        yield FigureRow(f"peak {dtype}", f"{whole:,.0f} TFLOP/s", f"{share:.1f} TFLOP/s", target.chip.source)
    link = f"{_rate(target.neuronlink)} a chip" if target.neuronlink else "one chip"
    yield FigureRow("NeuronLink", link, _rate(core.neuronlink) if target.neuronlink else "", target.source)
    name = f"EFA, {target.efa_devices} cards" if target.efa_devices else "network, no EFA"
    yield FigureRow(name, _rate(target.network), _rate(core.network), target.source)
    yield FigureRow("host", f"{target.vcpus} vCPUs, {target.host_memory / GIB:,.0f} GiB", "", target.source)


def _rate(bytes_a_second: float) -> str:
    rate = bytes_a_second / GB
    return f"{rate:,.2f} GB/s" if rate < 10 else f"{rate:,.0f} GB/s"


def environment(job: Job, *, all_modes: bool) -> Iterator[EnvironmentRow]:
    """The variables of a job in a process, a launch script, on several nodes and while it is compiled; those that must
    not be set come last.

    all_modes  also the values that a precision mode changes, a row for each mode
    """
    common = settings(job, *get_args(Where))
    known = {(one.name, one.value) for one in common}
    for one in common:
        yield EnvironmentRow(one.name, one.value, one.variable.when, one.by, one.variable.reason, one.variable.source)
    for mode in get_args(Precision) if all_modes else ():
        for one in settings(dataclasses.replace(job, precision=mode), "process"):
            if (one.name, one.value) not in known:
                by = f"precision {mode}"
                yield EnvironmentRow(
                    one.name, one.value, one.variable.when, by, one.variable.reason, one.variable.source
                )
    for wrong in refused():
        yield EnvironmentRow(wrong.name, f"not {wrong.when}", "process", "the table", wrong.reason, wrong.source)
