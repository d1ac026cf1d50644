"""Which rank this process is, for Neuron's PJRT client.

Room runtime/. Beside torch_xla/_internal/neuron.py (2.9), which tells the client under torchrun only: without a word
each rank of another launcher would be a world of its own, and all of them on one core. The client is made when the
device is first used, and taken to read the variables then. Imports the standard library only; `check` imports
torch_xla. NOT RUN on a device.
Proof: tests/runtime/test_pjrt.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.environment import set_variable
from nxdt_nemo.runtime.lane import Undo

__all__ = ["check", "tell", "tell_what_a_launcher_says"]

INDEX, WORLD, CORES = "NEURON_PJRT_PROCESS_INDEX", "NEURON_PJRT_WORLD_SIZE", "NEURON_RT_VISIBLE_CORES"
LOCAL_INDEX, LOCAL_COUNT = "PJRT_LOCAL_PROCESS_RANK", "PJRT_LOCAL_PROCESS_COUNT"
TORCHRUN = "TORCHELASTIC_RUN_ID"

# Rank, ranks, and the rank's place on its host. A step is what srun starts: a batch script itself is none.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


def tell_what_a_launcher_says() -> Undo:
    """Tell the client before anything uses the device, if the environment already says which rank this is."""
    for names in LAUNCHERS:
        if all(name in os.environ for name in names):
            rank, world, _ = (int(os.environ[name]) for name in names)
            return tell(rank, world)
    return lambda: None


def tell(rank: int, world: int) -> Undo:
    """Set what the client reads, where neither torch_xla (under torchrun) nor the user does; returns what undoes it."""
    undo = ExitStack()
    if world > 1 and TORCHRUN not in os.environ and INDEX not in os.environ:
        local = next((os.environ[names[2]] for names in LAUNCHERS if names[2] in os.environ), str(rank))
        said = {INDEX: str(rank), WORLD: str(world), LOCAL_INDEX: local, CORES: local}
        said[LOCAL_COUNT] = os.environ.get("LOCAL_WORLD_SIZE", "")
        for name, value in _missing(said).items():
            undo.callback(set_variable(name, value))
    return undo.close


def _missing(said: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in said.items() if value and not os.environ.get(name)}


def check(rank: int, world: int) -> None:
    """Raises LaneError where the client goes by another rank or world than torch.distributed: replica groups name the
    client's, and a collective would reach other ranks or none."""
    import torch_xla.runtime as xr

    found = (xr.global_ordinal(), xr.global_device_count())
    if found != (rank, world):
        raise LaneError(
            f"rank {rank} of {world} is device {found[0]} of {found[1]} to PJRT",
            place=f"{INDEX}={os.environ.get(INDEX, '')} {CORES}={os.environ.get(CORES, '')}",
            fix="start the ranks by torchrun, one core each, and use no device before they are up",
        )
