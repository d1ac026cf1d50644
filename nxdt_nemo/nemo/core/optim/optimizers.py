"""torch's optimizers with a state that fits a distributed checkpoint, and NxD Training's name for AdamW.

Room nemo/. Enters through nemo.core.optim.optimizers.AVAILABLE_OPTIMIZERS, NeMo's registry; no patch. torch keeps a
scalar `step` for each parameter, and megatron-core shards every state by its parameter's shape: `optim.name: adamw`
fails at the first save. Proof: tests/nemo/test_optim.py, tests/nemo/test_resume.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from nxdt_nemo.patching.view import Views

__all__ = ["STEPPED", "AdamW", "register"]


class _StepInGroup:
    """Stands before a torch optimizer: in its state_dict, `step` is the group's, as in Apex's FusedAdam."""

    def state_dict(self) -> dict[str, Any]:
        """torch's, with one `step` (int) a group that has state, and none in the parameters' states."""
        found: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        states = found["state"]
        for group in found["param_groups"]:
            steps = {int(states[index]["step"]) for index in group["params"] if "step" in states.get(index, {})}
            if len(steps) > 1:
                raise ValueError(f"parameters of one group have made different numbers of steps: {sorted(steps)}")
            if steps:
                group["step"] = steps.pop()
        found["state"] = {
            index: {name: value for name, value in state.items() if name != "step"} for index, state in states.items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what state_dict gave, or a torch optimizer's own."""
        states = {index: dict(state) for index, state in state_dict["state"].items()}
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            step = group.pop("step", None)
            for index in group["params"]:
                if step is not None and index in states:
                    states[index].setdefault("step", torch.tensor(float(step)))
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})  # type: ignore[misc]


class AdamW(_StepInGroup, torch.optim.AdamW):
    """torch.optim.AdamW."""


def _stepped(name: str) -> type:
    return type(name, (_StepInGroup, getattr(torch.optim, name)), {"__doc__": f"torch.optim.{name}."})


# adamw_fp32OptState is NxD Training's: with float32 main parameters (megatron_amp_O2) the state is float32 anyway.
STEPPED = {name.lower(): _stepped(name) for name in ("Adam", "Adadelta", "Adamax", "Adagrad", "RMSprop", "Rprop")} | {
    "adamw": AdamW,
    "adamw_fp32OptState": AdamW,
}


def register(module: ModuleType, _: Views) -> Callable[[], None]:
    """Put them under NeMo's names; returns what puts torch's back."""
    table = module.AVAILABLE_OPTIMIZERS
    before = dict(table)
    table.update(STEPPED)

    def undo() -> None:
        table.update({name: before[name] for name in STEPPED if name in before})
        table.pop("adamw_fp32OptState", None)

    return undo
