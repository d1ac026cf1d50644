"""Room config/: what a configuration says, checked before anything starts.

A leaf: imports omegaconf, the standard library and nxdt_nemo's errors, console and _resources; hydra, pydantic and
rich only when they are needed; never torch, NeMo, Megatron or another room.

    keys      every key that NeMo knows, and "did you mean" for the others
    rules     check() and sanitise(): the errors, the changes and what is ignored, as one Report
    checks    the rules that need more than one key, each with its message
    neuron    our own section `neuron:`
    compose   what hydra will compose for an unedited script, before that script runs
    instances what a Trainium instance has; environment, job: the variables that a run there needs
    launch    scripts and manifests that start a job

Proof: tests/config/.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxdt_nemo.config.compose import compose_for, precheck, world_size
    from nxdt_nemo.config.keys import names_in, unknown_keys
    from nxdt_nemo.config.neuron import NeuronConfig, neuron_section
    from nxdt_nemo.config.report import Change, Ignored, Report, Unknown
    from nxdt_nemo.config.rules import check, sanitise

__all__ = [
    "Change",
    "Ignored",
    "NeuronConfig",
    "Report",
    "Unknown",
    "check",
    "compose_for",
    "names_in",
    "neuron_section",
    "precheck",
    "sanitise",
    "unknown_keys",
    "world_size",
]

_HOME = {
    "Change": "report",
    "Ignored": "report",
    "NeuronConfig": "neuron",
    "Report": "report",
    "Unknown": "report",
    "check": "rules",
    "compose_for": "compose",
    "names_in": "keys",
    "neuron_section": "neuron",
    "precheck": "compose",
    "sanitise": "rules",
    "unknown_keys": "keys",
    "world_size": "compose",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: pydantic and hydra would cost every start that needs neither.
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
