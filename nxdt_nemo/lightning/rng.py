"""Where a rank's random streams stand, taken after a step and saved with a checkpoint.

Room lightning/. NeMo 2.4 saves no random state at all, so a resumed run draws other dropout masks. One
small file a rank, `rng/rank_00000.safetensors`, in the checkpoint's folder: tensors for torch's and Megatron's, JSON in
its metadata for Python's and numpy's. Proof: tests/lightning/test_rng.py, tests/nemo/test_resume.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nxdt_nemo import console
from nxdt_nemo.megatron.tensor_parallel.random import get_tracker_states, set_tracker_states
from nxdt_nemo.runtime import current

__all__ = ["RngSnapshot", "global_seed"]

FOLDER, TRACKER, SEED = "rng", "tracker.", 1234


def global_seed() -> int:
    """That of seed_everything, or 1234."""
    return int(os.environ.get("PL_GLOBAL_SEED", SEED))


@dataclass(frozen=True)
class RngSnapshot:
    """Python's, numpy's, torch's and Megatron's random states: uint8 [n], on the xla lane's device int64 [1].

    host     torch's on the host, where data sets and token_shuffle.py draw; None in files that do not have it
    device   torch's on the lane's device, where layers draw: on the cpu lane the same stream
    tracker  Megatron's streams on that device, by name
    """

    python: tuple[Any, ...]
    numpy: Any
    host: torch.Tensor | None
    device: torch.Tensor
    tracker: dict[str, torch.Tensor]

    @classmethod
    def take(cls) -> RngSnapshot:
        """The states as they are now on this rank."""
        host, device = torch.get_rng_state(), current().rng_state()
        return cls(random.getstate(), np.random.get_state(), host, device, get_tracker_states())

    def restore(self) -> None:
        """Make them so again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        if self.host is not None:
            torch.set_rng_state(self.host)
        current().set_rng_state(self.device)
        set_tracker_states(self.tracker)

    def save(self, folder: Path, rank: int, world: int) -> None:
        """Write this rank's file into a checkpoint's folder."""
        from safetensors.torch import save_file

        name, keys, *rest = self.numpy
        metadata = {
            "world_size": json.dumps(world),
            "groups": json.dumps(_groups()),
            "python": json.dumps(self.python),
            "numpy": json.dumps([name, keys.tolist(), *rest]),
        }
        tensors = {"device": self.device} | {TRACKER + key: state for key, state in self.tracker.items()}
        if self.host is not None:
            tensors["host"] = self.host
        path = _file(folder, rank)
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, folder: Path, rank: int, world: int) -> RngSnapshot | None:
        """This rank's states from a checkpoint's folder; None, said once, if it has none for this layout and device.

        A file without this rank's groups, as older ones are, is gone by its world size. Whose state a device's is shows
        in its dtype and shape.
        """
        from safetensors import safe_open

        path = _file(folder, rank)
        if not path.is_file():
            console.once(f"{folder.name} holds no random states for {world} ranks: dropout goes on from the seed")
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if json.loads(metadata["world_size"]) != world:
            console.once(f"{folder.name} was saved by {metadata['world_size']} ranks: dropout goes on from the seed")
            return None
        if json.loads(metadata.get("groups", "null")) not in (None, _groups()):
            console.once(f"{folder.name} was saved in another layout: dropout goes on from the seed")
            return None
        if _form(tensors["device"]) != _form(current().rng_state()):
            console.once(f"{folder.name} was saved on another kind of device: dropout goes on from the seed")
            return None
        version, state, gauss = json.loads(metadata["python"])
        name, keys, *rest = json.loads(metadata["numpy"])
        tracker = {key.removeprefix(TRACKER): t for key, t in tensors.items() if key.startswith(TRACKER)}
        numpy_state = (name, np.asarray(keys, dtype=np.uint32), *rest)
        python_state = (version, tuple(state), gauss)
        return cls(python_state, numpy_state, tensors.get("host"), tensors["device"], tracker)


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank_{rank:05d}.safetensors"


def _form(state: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    return state.dtype, state.shape


def _groups() -> dict[str, list[int]]:
    """The global ranks of this rank's groups, by dimension: sizes and placement. {} before Megatron has groups."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return {}
    groups = {
        "tp": state.get_tensor_model_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
        "dp": state.get_data_parallel_group(),
    }
    return {name: torch.distributed.get_process_group_ranks(group) for name, group in groups.items()}
