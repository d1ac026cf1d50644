"""A lane that this release names but does not fill: every use says so.

Room runtime/. Imports torch for type checking only. Proof: tests/runtime/test_unfilled.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.lane import Lane, MemoryFigures, Undo

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

    from nxdt_nemo.runtime.gaps import PremulSum
    from nxdt_nemo.runtime.groups import Group
    from nxdt_nemo.runtime.ops import Ops

__all__ = ["UnfilledLane", "not_yet"]


def not_yet(name: str) -> str:
    """The reason that a lane without code gives."""
    return f"{name} lane: not in this release yet"


class UnfilledLane(Lane):
    """Raises LaneError with the lane's and the method's name, whatever is called."""

    def _missing(self, what: str) -> NoReturn:
        raise LaneError(f"{not_yet(self.name)}, so it has no {what}", fix="use NXDT_NEMO_RUNTIME=cpu")

    def enter_process(self) -> Undo:
        self._missing("enter_process")

    def device(self, local_rank: int = 0) -> torch.device:
        self._missing("device")

    def device_count(self) -> int:
        self._missing("device_count")

    def name_of_device(self) -> str:
        self._missing("name_of_device")

    def supports(self, dtype: torch.dtype) -> bool:
        self._missing("supports")

    def total_memory(self) -> int:
        self._missing("total_memory")

    def memory(self) -> MemoryFigures:
        self._missing("memory")

    def reset_peak_memory(self) -> None:
        self._missing("reset_peak_memory")

    def synchronize(self) -> None:
        self._missing("synchronize")

    def manual_seed(self, seed: int) -> None:
        self._missing("manual_seed")

    def rng_state(self) -> torch.Tensor:
        self._missing("rng_state")

    def set_rng_state(self, state: torch.Tensor) -> None:
        self._missing("set_rng_state")

    def init_ranks(
        self,
        rank: int,
        world: int,
        *,
        init_method: str | None = None,
        store: Store | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self._missing("init_ranks")

    def close_ranks(self) -> None:
        self._missing("close_ranks")

    def groups(self, mesh: Sequence[Sequence[int]], name: str) -> Group:
        self._missing("groups")

    def world(self) -> Group:
        self._missing("world")

    def group_of(self, process_group: dist.ProcessGroup) -> Group:
        self._missing("group_of")

    def note_group(self, name: str, ranks: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        self._missing("note_group")

    def close_meshes(self) -> None:
        self._missing("close_meshes")

    @property
    def ops(self) -> Ops:
        self._missing("ops")

    def shard(self, tensor: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        self._missing("shard")

    def premul_sum(self, factor: float) -> PremulSum:
        self._missing("premul_sum")

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> dist.Work | None:
        self._missing("all_reduce")

    def coalescing(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None, async_ops: bool = False
    ) -> AbstractContextManager[Any]:
        self._missing("coalescing")

    def step_boundary(self) -> None:
        self._missing("step_boundary")

    def defer(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        self._missing("defer")
