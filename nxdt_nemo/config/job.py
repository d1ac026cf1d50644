"""What the environment of a job depends on: its precision, instance, cores, nodes, lane and launcher.

Room config/ (leaf). Imports the standard library and nxdt_nemo.errors. Precision modes are those of NxD Training's
precision.type. Proof: tests/config/test_environment.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from nxdt_nemo.config.instances import INSTANCES, Instance
from nxdt_nemo.errors import ConfigError

if TYPE_CHECKING:
    from nxdt_nemo.config.neuron import NeuronConfig
    from nxdt_nemo.config.view import View

__all__ = ["SDK", "VERSION", "Job", "Launcher", "Precision", "job_of", "precision_of"]

Launcher = Literal["torchrun", "slurm", "eks", "parallelcluster"]
Precision = Literal["bf16SR", "mixed_precision", "mixed_precision_SR", "autocast", "fp32", "manual"]

SDK = "2.29"
"""The Neuron SDK that values are for where nothing says otherwise: the last with torch-xla training."""

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
    sdk        the Neuron SDK
    keys       the section `neuron:` as plain values
    """

    precision: Precision | None = None
    instance: Instance | None = None
    devices: int | None = None
    nodes: int = 1
    lane: str = "xla"
    launcher: Launcher | None = None
    sdk: str = SDK
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cores_a_rank(self) -> int | None:
        """The LNC: the key's, else the one at which the instance has as many logical cores as a node has ranks, else
        the chip's default; without an instance the key's alone."""
        key: int | None = self.keys.get("lnc")
        if self.instance is None:
            return key
        told = None if self.devices is None else self.instance.lnc_of(self.devices)
        return self.instance.checked(key or told)


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
        sdk=keys.get("sdk", SDK),
        keys=keys,
    )
