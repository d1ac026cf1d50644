"""Our own section of a configuration, `neuron:`, beside NeMo's keys.

Room config/ (leaf). Stands in for the keys of NxD Training that are not NeMo's. May import pydantic, omegaconf and
nxdt_nemo.errors.
Proof: tests/config/test_neuron.py.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nxdt_nemo.config.alignment import Alignment, Dpo, Orpo, Sft
from nxdt_nemo.config.environment import variables
from nxdt_nemo.config.instances import INSTANCES, instance
from nxdt_nemo.config.job import VERSION
from nxdt_nemo.config.report import or_list
from nxdt_nemo.errors import ConfigError

__all__ = ["NeuronConfig", "neuron_section"]

LANES = ("auto", "cpu", "xla", "neuron")


def _number(value: Any) -> Any:
    """A whole number that stands in quotation marks, as NeMo's keys may have it."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


_QUOTED = BeforeValidator(_number)
_Count = Annotated[int, Field(ge=0), _QUOTED]
_Size = Annotated[int, Field(ge=1), _QUOTED]


class NeuronConfig(BaseModel):
    """The section `neuron:`, at the top level of the YAML or as overrides such as `+neuron.runtime=cpu`.

    runtime       the lane to run on; None leaves it to the environment (NXDT_NEMO_RUNTIME)
    instance      the instance type of the nodes, to compare trainer.devices with
    strict_keys   a key that nobody reads is an error, not a warning
    stochastic_rounding   sets NEURON_RT_STOCHASTIC_ROUNDING_EN to 1 or 0; None leaves it to the environment. NxD
                          Training's precision.type mixed_precision_SR, with megatron_amp_O2
    precision     NxD Training's precision.type; None takes it from trainer.precision and model.megatron_amp_O2
    lnc           physical cores of a rank on trn2, 1 or 2; None takes it from trainer.devices, else the chip's default
    sdk           the Neuron SDK's version, as in 2.29

    Each of these is a variable of configs/environment.toml, NxD Training's key in brackets:

    compiler_flags                     options of neuronx-cc [compiler_flags]
    compiler_cache_url                 folder or s3:// address of compiled graphs [compiler_cache_url]
    async_exec_max_inflight_requests   graphs handed over ahead [aync_exec_max_inflight_requests]
    bucket_size_collectives            MiB of gradients of one collective: model.optim.bucket_cap_mb of a sharded
                                       optimizer, else model.grad_allreduce_chunk_size_mb [bucket_size_collectives]
    exec_timeout                       seconds that a graph may take [neuron_rt_exec_timeout]
    compress_replica_groups            short replica groups [neuron_experimental_compress_rg]
    fuse_softmax                       softmax as one operation [model.fusions.softmax]
    environment                        further variables, by name
    vocab_size    the tokenizer's pieces, for what is computed where the tokenizer is not at hand: memory
    alignment     preference training, see alignment.py
    targets       packages whose classes a `_target_` may name, beside those of targets.py
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    runtime: Literal["auto", "cpu", "xla", "neuron"] | None = None
    instance: str | None = None
    strict_keys: bool = False
    stochastic_rounding: bool | None = None
    precision: Literal["bf16SR", "mixed_precision", "mixed_precision_SR", "autocast", "fp32", "manual"] | None = None
    lnc: Annotated[Literal[1, 2], _QUOTED] | None = None
    sdk: str | None = Field(default=None, pattern=f"^{VERSION}$", coerce_numbers_to_str=True)
    compiler_flags: str | None = None
    compiler_cache_url: str | None = None
    async_exec_max_inflight_requests: _Count | None = None
    bucket_size_collectives: _Size | None = None
    exec_timeout: _Count | None = None
    compress_replica_groups: bool | None = None
    fuse_softmax: bool | None = None
    environment: dict[str, str | int | bool] | None = None
    vocab_size: _Size | None = None
    alignment: Alignment | None = None
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()

    def devices(self) -> tuple[int, ...]:
        """The device counts that the instance can have, at its LNC if one is named; empty without an instance."""
        if self.instance is None:
            return ()
        kind = INSTANCES[self.instance]
        return (kind.cores(self.lnc),) if self.lnc in kind.chip.lnc else kind.ranks


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
    return f"its keys are {', '.join(NeuronConfig.model_fields)}"


def _names(above: list[str]) -> list[str]:
    """The keys of neuron's section that is named by these."""
    methods: dict[str, type[BaseModel]] = {"sft": Sft, "dpo": Dpo, "orpo": Orpo}
    model: type[BaseModel] = NeuronConfig if not above else methods.get(above[-1], Alignment)
    return list(model.model_fields)


def _one_line(error: ValidationError, place: str) -> ConfigError:
    """The first finding of pydantic in our words."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    *above, name = path[:2] if path[0] == "environment" else path  # below a variable come the types that it tried
    key = ".".join([*above, name])
    if first["type"] == "extra_forbidden":
        names = {variable.nxdt: variable.key for variable in variables() if variable.nxdt and variable.key}
        near = [names[name]] if name in names else difflib.get_close_matches(name, _names(above), n=1)
        return ConfigError(
            f"unknown key neuron.{key}", place=place, fix=f"did you mean {near[0]}?" if near else _example()
        )
    fix = f"use {or_list(LANES)}" if key == "runtime" else ""
    reason = "is not a lane" if key == "runtime" else f"is wrong ({first['msg'].lower()})"
    return ConfigError(f"neuron.{key}={first['input']} {reason}", place=place, fix=fix)
