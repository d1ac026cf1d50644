"""What the environment of a job depends on: its precision, instance, cores, nodes, lane and launcher.

Room config/ (leaf). Imports the standard library and nxdt_nemo.errors. Precision modes are those of NxD Training's
precision.type. Proof: tests/config/test_environment.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from nxdt_nemo.config.instances import INSTANCES, Instance
from nxdt_nemo.config.report import or_list
from nxdt_nemo.errors import ConfigError

if TYPE_CHECKING:
    from nxdt_nemo.config.neuron import NeuronConfig
    from nxdt_nemo.config.view import View

__all__ = ["SDKS", "VERSION", "Job", "Launcher", "Precision", "job_of", "precision_of"]

Launcher = Literal["torchrun", "slurm", "eks", "parallelcluster"]
Precision = Literal["bf16SR", "mixed_precision", "mixed_precision_SR", "autocast", "fp32", "manual"]

SDKS: Mapping[str, tuple[str, str]] = {"xla": ("2.27", "2.29"), "neuron": ("2.33", "")}
"""The first and the last Neuron SDK that a lane runs with, "" while there is no last: docs/trainium.md, neuron.md.
Where nothing says otherwise values are for the last, else for the first."""

VERSION = r"\d+(\.\d+){1,2}"
"""How a version of it is written."""


@dataclass(frozen=True)
class Job:
    """What values depend on.

    precision  the mode in NxD Training's words, None when nothing is known of it
    instance   the instance type, None where there is none to go by
    devices    ranks of a node, None when nothing is known of them
    nodes      how many there are
    lane       the lane that runs
    launcher   how ranks are started; None for a process that runs already
    sdk        the Neuron SDK; None for the lane's own
    keys       the section `neuron:` as plain values
    place      the file that errors name
    """

    precision: Precision | None = None
    instance: Instance | None = None
    devices: int | None = None
    nodes: int = 1
    lane: str = "xla"
    launcher: Launcher | None = None
    sdk: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def neuron_sdk(self) -> str:
        """The Neuron SDK that values are for."""
        first, last = SDKS.get(self.lane, SDKS["xla"])
        return self.sdk or last or first

    @property
    def lane_there(self) -> str:
        """The lane on an instance: the key's, but never `auto`, which takes the cpu lane in this release."""
        runtime = self.keys.get("runtime")
        return runtime if runtime in ("cpu", "xla", "neuron") else "xla"

    @property
    def cores_a_rank(self) -> int | None:
        """The LNC: the key's, else the one at which the instance has as many logical cores as a node has ranks, else
        the chip's default; without an instance the key's alone."""
        key: int | None = self.keys.get("lnc")
        if self.instance is None:
            return key
        told = None if self.devices is None else self.instance.lnc_of(self.devices)
        try:
            return self.instance.checked(key or told)
        except ConfigError as error:
            raise self.error(error.reason, error.fix) from None

    def error(self, reason: str, fix: str = "") -> ConfigError:
        """A ConfigError at the job's place."""
        return ConfigError(reason, place=self.place, fix=fix)

    def check_lane(self) -> None:
        """Raises ConfigError for a lane that the chip or the SDK has not."""
        if self.lane not in SDKS:
            return
        if self.instance is not None and self.lane not in self.instance.chip.lanes:
            has = or_list(self.instance.chip.lanes)
            fix = f"{self.instance.chip.name} has the {has} lane only"
            raise self.error(f"neuron.runtime={self.lane} on {self.instance.name}", fix)
        first, last = SDKS[self.lane]
        if _version(self.neuron_sdk) < _version(first) or (last and _version(self.neuron_sdk) > _version(last)):
            runs = f"{first} to {last}" if last else f"{first} or later"
            reason = f"the {self.lane} lane needs the Neuron SDK {runs}, not {self.sdk}"
            raise self.error(reason, "name one of them: neuron.sdk, --sdk")

    def check_ranks(self) -> None:
        """Raises ConfigError for more ranks than a node has logical cores."""
        has, at, fix = self._cores()
        if self.instance is not None and has and (self.devices or 0) > max(has):
            raise self.error(f"trainer.devices={self.devices}, and a {self.instance.name} has {max(has)}{at}", fix)

    def check_nodes(self) -> None:
        """Raises ConfigError for several nodes that cannot work together: without a network, or in part idle."""
        has, at, fix = self._cores()
        if self.instance is None or not has or self.nodes == 1:
            return
        if not self.instance.efa_devices:
            raise self.error(f"{self.nodes} nodes of {self.instance.name}, which has no EFA", "use one node")
        if (self.devices or 0) > 0 and self.devices not in has:
            reason = f"trainer.devices={self.devices} leaves a part of each {self.instance.name} idle{at}"
            raise self.error(f"{reason}, and collectives need whole nodes", fix)

    def _cores(self) -> tuple[tuple[int, ...], str, str]:
        """Logical cores that a node can have, none on the cpu lane; at which LNC, if a key says; what to do instead."""
        kind, lnc = self.instance, self.keys.get("lnc")
        if kind is None or self.lane == "cpu":
            return (), "", ""
        if lnc is None:
            return kind.ranks, "", f"use {or_list(kind.ranks)}"
        cores, other = kind.cores(self.cores_a_rank), kind.lnc_of(self.devices or 0)
        return (cores,), f" at neuron.lnc={lnc}", f"set neuron.lnc={other}" if other else f"use {cores}"


def _version(text: str) -> tuple[int, ...]:
    """The release: the first two numbers."""
    return tuple(int(part) for part in text.split(".")[:2])


def precision_of(trainer: Any, *, o2: bool, rounding: bool | None, asked: str | None = None) -> Precision | None:
    """The mode in NxD Training's words, from NeMo's keys.

    trainer   trainer.precision: 32, bf16, bf16-mixed, ...
    o2        model.megatron_amp_O2: bf16 weights with float32 main ones
    rounding  neuron.stochastic_rounding
    asked     neuron.precision, which comes first
    None for a precision that is none of these. Raises ConfigError when the keys contradict each other.
    """
    text = str(trainer)
    whole, half = text in ("32", "32-true", "fp32"), text.startswith("bf16")
    if asked is not None:
        if trainer is not None and asked != "manual" and (half if asked == "fp32" else whole):
            fix = "use trainer.precision=32" if asked == "fp32" else "use trainer.precision=bf16"
            raise ConfigError(f"neuron.precision={asked} contradicts trainer.precision={text}", fix=fix)
        rounds = {"bf16SR": True, "mixed_precision_SR": True, "mixed_precision": False, "autocast": False}.get(asked)
        if rounding is not None and rounds is not None and rounds is not rounding:
            reason = f"neuron.precision={asked} contradicts neuron.stochastic_rounding={rounding}"
            raise ConfigError(reason, fix="leave one of them out")
        return cast(Precision, asked)
    if whole:
        return "fp32"
    if not half:
        return None
    if not o2:
        return "bf16SR" if rounding else "autocast"
    return "mixed_precision_SR" if rounding else "mixed_precision"


def job_of(view: View, neuron: NeuronConfig | None = None, *, on: Instance | None = None) -> Job:
    """The job of a configuration, on the lane and by the launcher that nothing is known of yet.

    on  the instance type, in place of neuron.instance
    Raises ConfigError when keys of `neuron:` contradict NeMo's.
    """
    keys: dict[str, Any] = {} if neuron is None else neuron.model_dump(exclude_none=True)
    o2 = bool(view.get("model.megatron_amp_O2", False))
    trainer = view.get("trainer.precision", view.get("model.precision"))
    try:
        precision = precision_of(trainer, o2=o2, rounding=keys.get("stochastic_rounding"), asked=keys.get("precision"))
    except ConfigError as error:
        raise view.error(error.reason, error.fix) from None
    instance = on or INSTANCES.get(keys.get("instance", ""))
    devices = view.number("trainer.devices")
    return Job(
        precision=precision,
        instance=instance,
        devices=devices,
        nodes=view.size("trainer.num_nodes"),
        sdk=keys.get("sdk"),
        keys=keys,
        place=view.place,
    )
