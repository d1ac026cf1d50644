"""All ranks' steps in one process: one rank's program, traced once, run on many devices of XLA:CPU.

Room runtime/. torch_xla's manual sharding (Shardy's shard_map, in other words): what differs between ranks is stacked
[W, ...] over the devices, the program is traced on one part, and its collectives are real ones inside the graph. It is
what shows that a program is the same for all ranks, for up to 32 of them on two cores. Needs CPU_NUM_DEVICES=W, set
before torch_xla is imported, and a process of its own. No pipelines: their stages are different programs.

On XLA:CPU a collective-permute aborts the process in this mode, and an all-to-all fails: both are an all-gather and a
choice here. A step that draws random numbers is refused: torch_xla's seed is one number of the graph, so that all ranks
would draw the same ones, in tensor-parallel regions too. Imports torch and torch_xla.
Proof: tests/runtime/test_xla_lift.py, tests/megatron/test_xla_lift.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.xla.in_graph import Dialect, Groups

__all__ = ["Lift"]


class Lift(Dialect):
    """W ranks on W devices.

    Between steps a value of the ranks is one tensor [W, ...] on all devices; within a step each rank has its own part.
    """

    def __init__(self, world: int) -> None:
        found = xr.global_runtime_device_count()
        if found != world:
            raise LaneError(f"{found} devices for {world} ranks", fix=f"set CPU_NUM_DEVICES={world} before the start")
        xr.use_spmd()
        self.world = world
        self._mesh = xs.Mesh(np.arange(world), (world,), ("rank",))
        self._kept: dict[Any, Tensor] = {}
        self._values: dict[tuple[int, ...], Tensor] = {}
        self._here: dict[tuple[int, ...], Tensor] = {}
        self._channel = 0
        self._drawing_nothing: set[bytes] = set()  # keys of graphs

    # --- values ---

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """[W, ...] on the devices, from each rank's [...] on the host."""
        return self._marked(torch.stack(list(parts)).to(xm.xla_device()))

    def _spec(self, dims: int) -> tuple[Any, ...]:
        return ("rank", *(None for _ in range(dims - 1)))

    def _marked(self, whole: Tensor) -> Tensor:
        xs.mark_sharding(whole, self._mesh, self._spec(whole.dim()))
        return whole

    def enter(self, whole: Tensor) -> Tensor:
        """This rank's part [...] of [W, ...], in the step."""
        part = xs.enable_manual_sharding(whole, self._spec(whole.dim()), mesh=self._mesh)
        mine: Tensor = xs.xla_sharding.unwrap_sharded_tensor(part)
        return mine.reshape(whole.shape[1:])

    def leave(self, part: Tensor) -> Tensor:
        """[W, ...] of the ranks' parts [...], at the end of the step."""
        shape = (self.world, *part.shape)
        made = xs.disable_manual_sharding(part[None], self._spec(len(shape)), torch.Size(shape), mesh=self._mesh)
        whole: Tensor = xs.xla_sharding.unwrap_sharded_tensor(made)
        return whole

    def value(self, of_rank: Sequence[int]) -> Tensor:
        """int64 [1], another on each rank; within a step."""
        key = tuple(of_rank)
        if key not in self._values:
            self._values[key] = self.stack([torch.tensor([one]) for one in key])
        if key not in self._here:
            self._here[key] = self.enter(self._values[key])
        return self._here[key]

    # --- a step ---

    def step(
        self, state: Callable[[], Iterable[Tensor]], inputs: Sequence[Tensor], run: Callable[..., Sequence[Tensor]]
    ) -> list[Tensor]:
        """Run one step on all ranks; returns what it returns, [W, ...] on the host.

        state   the tensors that live on from step to step, as they are now; their memory is exchanged
        inputs  [W, ...], see stack; `run` gets each rank's part
        Raises LaneError for a step that draws random numbers.
        """
        self._here.clear()
        self._channel = 0
        torch_xla._XLAC._set_all_reduce_token(str(xm.xla_device()), None)
        for tensor in state():
            if id(tensor) in self._kept:
                tensor.data = self.enter(self._kept[id(tensor)])
        results = [self.leave(result) for result in run(*(self.enter(one) for one in inputs))]
        lasting = list(state())
        self._kept = {id(tensor): self.leave(tensor.detach()) for tensor in lasting}
        made = [*self._kept.values(), *results]
        self._refuse_draws(made)
        torch_xla._XLAC._xla_sync_multi(made, devices=[], wait=True, sync_xla_data=True)
        return [result.cpu() for result in results]

    def _refuse_draws(self, made: list[Tensor]) -> None:
        key = torch_xla._XLAC._get_graph_hash(made)
        if key in self._drawing_nothing:
            return
        if "rng-bit-generator" in torch_xla._XLAC._get_xla_tensors_hlo(made):
            raise LaneError(
                "the step draws random numbers, and all ranks of one process would draw the same ones",
                place="Lift.step",
                fix="set hidden_dropout and attention_dropout to 0",
            )
        self._drawing_nothing.add(key)

    def keep(self, tensor: Tensor, parts: Sequence[Tensor]) -> None:
        """Give a tensor of `state` its ranks' values."""
        self._kept[id(tensor)] = self.stack(parts)

    # --- collectives ---

    def _next(self) -> int:
        self._channel += 1
        return self._channel

    def all_reduce(self, x: Tensor, kind: str, scale: float, groups: Groups) -> Tensor:
        reduced: Tensor = torch_xla._XLAC._xla_spmd_all_reduce(kind, x, scale, groups)
        return reduced

    def all_gather(self, x: Tensor, dim: int, groups: Groups) -> Tensor:
        told = {"groups": groups, "pin_layout": False, "channel_id": self._next(), "use_global_device_ids": True}
        whole: Tensor = xm.all_gather(x, dim, **told)
        return whole

    def reduce_scatter(self, x: Tensor, dim: int, groups: Groups) -> Tensor:
        told = {"groups": groups, "pin_layout": False, "channel_id": self._next(), "use_global_device_ids": True}
        part: Tensor = xm.reduce_scatter(xm.REDUCE_SUM, x, 1.0, dim, len(groups[0]), **told)
        return part

    def all_to_all(self, x: Tensor, group: Group, groups: Groups) -> Tensor:
        rows = self.all_gather(x.unflatten(0, (group.size, -1))[None], 0, groups)  # [from, to, n, ..]
        return rows.index_select(1, self.place(group, x.device)).squeeze(1).flatten(0, 1)

    def permute(self, x: Tensor, pairs: Groups, group: Group) -> Tensor:
        source = {to: since for since, to in pairs}
        places = {rank: place for ranks in group.mesh for place, rank in enumerate(ranks)}
        chosen = self.value([places[source.get(rank, rank)] for rank in range(self.world)])
        known = self.value([int(rank in source) for rank in range(self.world)])
        everyone = self.all_gather(x[None], 0, [list(ranks) for ranks in group.mesh])
        return everyone.index_select(0, chosen).squeeze(0) * known.to(x.dtype)

    def place(self, group: Group, device: torch.device) -> Tensor:
        places = {rank: place for ranks in group.mesh for place, rank in enumerate(ranks)}
        return self.value([places[rank] for rank in range(self.world)])
