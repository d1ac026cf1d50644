"""The lane itself: torch-xla's device, random numbers, ranks and the ends of steps.

Room runtime/. torch_xla is imported when the lane is used, torch_neuronx by torch_xla where it is there; without it
the same programs run on XLA:CPU. Proof: tests/runtime/test_xla.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.environment import set_variable
from nxdt_nemo.runtime.lane import MemoryFigures, Undo, Verdict
from nxdt_nemo.runtime.machine import (
    host_memory,
    installed,
    neuron_devices,
    process_memory,
    ranks_placed_here,
    reset_process_peak,
)
from nxdt_nemo.runtime.ranks import RanksLane
from nxdt_nemo.runtime.xla.freed_memory import keep_freed_memory
from nxdt_nemo.runtime.xla.pjrt import check, tell, tell_what_a_launcher_says

if TYPE_CHECKING:
    import torch

    from nxdt_nemo.runtime.ops import Ops

__all__ = ["XlaLane"]

PJRT = "PJRT_DEVICE"

# XLA:CPU takes barriers out before it looks for common subexpressions the last time, and so recomputation with them.
FLAGS, DISABLED, EXPANDER = "XLA_FLAGS", "--xla_disable_hlo_passes", "cse_barrier_expander"

# Elements of a transposed matrix, multiples of its rows' length, and rows of the other one: a copy takes less than it
# saves, as measured.
LARGE, ROUND, MANY = 1 << 18, 256, 256


class XlaLane(RanksLane):
    """Graphs traced by torch-xla, one process a NeuronCore; XLA:CPU where there is none.

    Values that a step computes are read at the next boundary: see defer.
    """

    name = "xla"
    has_storages = False
    has_inference_mode = False  # torch_xla gives such a view a version counter, which torch refuses there
    backend = "nxdt_xla"  # not torch_xla's "xla", whose groups of some ranks are groups of one (xla_backend.py)
    traced = True

    def __init__(self) -> None:
        super().__init__()
        self._met = False  # the ranks, on a device
        self.on_cut: Callable[[], None] | None = None  # in place of handing a graph over: see world.py
        self._asked: list[tuple[Callable[..., None], tuple[torch.Tensor, ...]]] = []
        self._due: list[tuple[Callable[..., None], tuple[torch.Tensor, ...]]] = []

    @classmethod
    def probe(cls, *, asked: bool = False) -> Verdict:
        """On XLA:CPU where there is no Neuron device. `auto` does not choose it in this release: see docs/xla.md."""
        if installed("torch_xla") is None:
            hint = ": pip install 'nxdt-nemo[xla]'" if asked else ""
            return Verdict(False, f"torch_xla is not installed{hint}")
        if not neuron_devices():
            return Verdict(asked, "XLA:CPU" if asked else "no Neuron device")
        if installed("libneuronxla") is None:
            return Verdict(False, "libneuronxla is not installed: it comes with the AWS Neuron SDK")
        return Verdict(asked, "a Neuron device, on which nobody has tried it" if asked else "has to be asked for")

    def enter_process(self) -> Undo:
        """torch_xla reads PJRT_DEVICE when it is imported: it is set before, and on a device which rank this is.
        XLA:CPU keeps optimization barriers, and what it frees."""
        undo = ExitStack()
        undo.callback(set_variable(PJRT, "NEURON" if neuron_devices() else "CPU"))
        flags = os.environ.get(FLAGS, "")
        if neuron_devices():
            undo.callback(tell_what_a_launcher_says())
        else:
            undo.callback(keep_freed_memory())
            if DISABLED not in flags:
                undo.callback(set_variable(FLAGS, f"{flags} {DISABLED}={EXPANDER}".strip()))
        return undo.close

    def device(self, local_rank: int = 0) -> torch.device:
        """The one device of this process. Not torch_xla.device(), which makes the client: it has to know the ranks."""
        import torch
        import torch_xla  # noqa: F401 - the backend of that name

        return torch.device("xla", 0)

    def device_count(self) -> int:
        return ranks_placed_here() or 1

    def name_of_device(self) -> str:
        import torch_xla.runtime as xr

        return f"XLA:{xr.device_type()}"

    def total_memory(self) -> int:
        return host_memory() if self._on_host else int(self._memory_info()["bytes_limit"])

    def memory(self) -> MemoryFigures:
        if self._on_host:
            return MemoryFigures(*process_memory())
        used = int(self._memory_info()["bytes_used"])
        return MemoryFigures(used, used, max(used, int(self._memory_info().get("peak_bytes_used", 0))))

    def reset_peak_memory(self) -> None:
        if self._on_host:
            reset_process_peak()

    @cached_property
    def _on_host(self) -> bool:
        import torch_xla.runtime as xr

        return bool(xr.device_type() == "CPU")

    def _memory_info(self) -> dict[str, int]:
        import torch_xla.core.xla_model as xm

        found: dict[str, int] = xm.get_memory_info(self.device())
        return found

    def synchronize(self) -> None:
        """What is traced and not handed over stays so: upstream asks in the middle of a step (batch_p2p_sync, timers),
        which is one graph all the same. See cut."""
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()

    def manual_seed(self, seed: int) -> None:
        import torch_xla.core.xla_model as xm

        xm.set_rng_state(seed % 2**64)

    def rng_state(self) -> torch.Tensor:
        """torch_xla's is one number of 64 bits, without a sign: int64 [1] of the same bits."""
        import torch
        import torch_xla.core.xla_model as xm

        state = xm.get_rng_state()
        # On the host by name: Lightning builds models with the device as torch's default one.
        return torch.tensor([state - 2**64 if state >= 2**63 else state], dtype=torch.int64, device="cpu")

    def set_rng_state(self, state: torch.Tensor) -> None:
        import torch_xla.core.xla_model as xm

        xm.set_rng_state(int(state[0]) % 2**64)

    def register_backend(self) -> None:
        from nxdt_nemo.runtime.xla.process_group import register

        register(self.backend)

    def ranks_are_coming(self, rank: int, world: int) -> None:
        if not self._on_host and not self.alone:
            tell(rank, world)

    def ranks_are_up(self) -> None:
        """On a device: raises LaneError unless PJRT has the same ranks, and all of them answer. NeuronRT sets its
        collectives up with the first one, for which the whole world has to be there."""
        import torch
        import torch.distributed as dist

        rank, world = dist.get_rank(), dist.get_world_size()
        if self._on_host or self.alone or self._met or world == 1:
            return
        tell(rank, world)
        check(rank, world)
        self.cut()
        ones = torch.ones(1, device=self.device())
        count = int(self.ops.all_reduce_(ones, self.world(), "sum").item())
        if count != world:
            raise LaneError(f"{count} of {world} ranks answer rank {rank} on the device", place="ranks_are_up")
        self._met = True

    @cached_property
    def ops(self) -> Ops:
        """In the graph; XLA:CPU's client knows one rank only, so that there the graph is cut."""
        if not self._on_host:
            from nxdt_nemo.runtime.xla.in_graph import Replicas, in_graph

            return in_graph(Replicas())
        from nxdt_nemo.runtime.xla.ops import hosted, table

        return table(hosted())

    def step_boundary(self) -> None:
        """Hand the graph over, and answer what was asked of the one before: it is done, or nearly."""
        self.cut()
        if self.alone:
            self._asked.clear()
            return
        due, self._due, self._asked = self._due, self._asked, []
        for function, tensors in due:
            function(*(tensor.cpu() for tensor in tensors))

    def cut(self) -> None:
        from nxdt_nemo.runtime.xla.ops import cut

        cut()

    def optimization_barrier_(self, tensors: Sequence[torch.Tensor]) -> None:
        import torch_xla

        if there := [tensor for tensor in tensors if tensor.device.type == "xla"]:
            torch_xla._XLAC._xla_optimization_barrier_(there)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """See laid_out; with few rows a copy is not worth it."""
        return super().matmul(a, self.laid_out(b) if b.dim() == 2 and a.shape[:-1].numel() >= MANY else b)

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """XLA:CPU multiplies by a transposed matrix at down to half the speed where its rows lie a round number of
        bytes apart, on the same lines of a cache, and takes a large one from a copy: the barrier keeps the
        transposition out of the product. On a device, and in graphs that stand for one, as is."""
        if x.shape[0] % ROUND or x.numel() < LARGE or not self._on_host or self.alone:
            return x
        x = x.clone()
        self.optimization_barrier_([x])
        return x

    @contextmanager
    def unread(self) -> Iterator[None]:
        """torch_xla's collectives follow each other by a token, so that each is computed for the sake of the next. What
        comes after the block does not wait for its last ones: all ranks of their groups run one program."""
        import torch_xla

        device = str(self.device())
        token = torch_xla._XLAC._get_all_reduce_token(device)
        try:
            yield
        finally:
            torch_xla._XLAC._set_all_reduce_token(device, token)

    def reading(self) -> AbstractContextManager[Any]:
        from nxdt_nemo.runtime.xla.reading import Reading

        return Reading()

    def defer(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Called at the boundary after the next one, so that the host never waits for the step it has just begun."""
        self._asked.append((function, tuple(tensor.detach() for tensor in tensors)))

    def settle(self) -> None:
        self.step_boundary()
        self.step_boundary()

    def salvage(self) -> None:
        import torch_xla

        left, self._due, self._asked = self._due + self._asked, [], []
        for function, tensors in left:
            if not any(torch_xla._XLAC._check_tensor_need_materialization(list(tensors))):
                function(*(tensor.cpu() for tensor in tensors))

    def close_ranks(self) -> None:
        self.settle()
        self._met = False
        super().close_ranks()

    def forget_ranks(self) -> None:
        """As close_ranks, of ranks whose graphs nobody is going to run."""
        super().close_ranks()
