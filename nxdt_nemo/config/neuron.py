"""Our own section of a configuration, `neuron:`, beside NeMo's keys.

Room config/ (leaf). Stands in for nothing upstream. May import pydantic, omegaconf and nxdt_nemo.errors.
Proof: tests/config/test_neuron.py.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nxdt_nemo.config.alignment import Alignment, Dpo, Orpo, Sft
from nxdt_nemo.config.instances import INSTANCES, instance
from nxdt_nemo.config.report import or_list
from nxdt_nemo.errors import ConfigError

__all__ = ["NeuronConfig", "neuron_section"]

LANES = ("auto", "cpu", "xla", "neuron")


class NeuronConfig(BaseModel):
    """The section `neuron:`, at the top level of the YAML or as overrides such as `+neuron.runtime=cpu`.

    runtime       the lane to run on; None leaves it to the environment (NXDT_NEMO_RUNTIME)
    instance      the instance type of the nodes, to compare trainer.devices with
    strict_keys   a key that nobody reads is an error, not a warning
    stochastic_rounding   sets NEURON_RT_STOCHASTIC_ROUNDING_EN to 1 or 0; None leaves it to the environment. NxD
                          Training's precision.type mixed_precision_SR, with megatron_amp_O2
    vocab_size    the tokenizer's pieces, for what is computed where the tokenizer is not at hand: memory
    alignment     preference training, see alignment.py
    targets       packages whose classes a `_target_` may name, beside those of targets.py
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    runtime: Literal["auto", "cpu", "xla", "neuron"] | None = None
    instance: str | None = None
    strict_keys: bool = False
    stochastic_rounding: bool | None = None
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    alignment: Alignment | None = None
    targets: tuple[str, ...] | list[str] = ()

    def devices(self) -> tuple[int, ...]:
        """The device counts that the instance can have; empty when no instance is named."""
        return INSTANCES[self.instance].ranks if self.instance else ()


def neuron_section(cfg: DictConfig, *, place: str = "") -> NeuronConfig:
    """The section of a config, with defaults where it says nothing.

    Raises ConfigError for an unknown key (with the nearest name), a wrong value, or an instance that is not known.
    """
    section = OmegaConf.select(cfg, "neuron")
    if section is None:
        return NeuronConfig()
    if not isinstance(section, DictConfig):
        raise ConfigError(f"neuron={section} is not a section", place=place, fix=_example())
    try:
        found = NeuronConfig.model_validate(OmegaConf.to_container(section, resolve=True))
    except ValidationError as error:
        raise _one_line(error, place) from None
    if found.instance is not None:
        instance(found.instance, key="neuron.instance", place=place)
    return found


def _example() -> str:
    return f"write its keys: {or_list(f'neuron.{name}' for name in NeuronConfig.model_fields)}"


def _names(above: list[str]) -> list[str]:
    """The keys of neuron's section that is named by these."""
    methods: dict[str, type[BaseModel]] = {"sft": Sft, "dpo": Dpo, "orpo": Orpo}
    model: type[BaseModel] = NeuronConfig if not above else methods.get(above[-1], Alignment)
    return list(model.model_fields)


def _one_line(error: ValidationError, place: str) -> ConfigError:
    """The first finding of pydantic in our words."""
    first = error.errors()[0]
    *above, name = (str(part) for part in first["loc"] if part not in ("tuple[str, ...]", "list[str]"))
    key = ".".join([*above, name])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _names(above), n=1)
        return ConfigError(
            f"unknown key neuron.{key}", place=place, fix=f"did you mean {near[0]}?" if near else _example()
        )
    fix = f"use {or_list(LANES)}" if key == "runtime" else ""
    reason = "is not a lane" if key == "runtime" else f"is wrong ({first['msg'].lower()})"
    return ConfigError(f"neuron.{key}={first['input']} {reason}", place=place, fix=fix)
