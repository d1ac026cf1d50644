"""The interface of a lane: one kind of device.

Room runtime/. Stands in for torch.cuda's device API and torch.distributed's bring-up. Imports torch for
type checking only, so that a lane can be probed before torch is loaded. Proof: tests/runtime/test_cpu.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

    from nxdt_nemo.runtime.gaps import PremulSum
    from nxdt_nemo.runtime.groups import Group
    from nxdt_nemo.runtime.ops import Ops

__all__ = ["Lane", "LaneName", "MemoryFigures", "Undo", "Verdict"]

LaneName = Literal["cpu", "xla", "neuron"]
Undo = Callable[[], None]


class Verdict(NamedTuple):
    """Whether a lane can be used on this machine, and why (not)."""

    usable: bool
    reason: str


class MemoryFigures(NamedTuple):
    """A rank's memory in bytes; allocated <= reserved <= peak.

    allocated  held by tensors (cpu: RssAnon, all private memory, so mapped files do not count)
    reserved   held by the process on the device (cpu: resident set)
    peak       highest `reserved` since the start or reset_peak_memory()
    """

    allocated: int
    reserved: int
    peak: int


class Lane(ABC):
    """One kind of device.

    Order of calls: 1 probe (before any device exists), 2 enter_process (before torch_xla or accelerate can be
    imported), 3 device (each rank), 4 init_ranks (all ranks), 5 groups (all ranks, same order), 6 rng (each
    rank), 7 step_boundary (each rank, after the optimizer), 8 close_ranks.
    """

    name: ClassVar[LaneName]
    backend: ClassVar[str]
    """Name of the torch.distributed backend that moves this lane's tensors."""
    ragged: ClassVar[bool] = False
    """Shapes and loops may depend on a tensor's values: true where operations run one by one, as they are called, and
    a new shape costs nothing."""
    traced: ClassVar[bool] = False
    """A step is recorded as a graph before it runs: what differs between ranks or steps makes another graph."""
    alone: bool = False
    """This process stands for one rank of a world whose others do not run: groups are the lane's, gloo's included."""
    has_storages: ClassVar[bool] = True
    """A tensor's memory is there when the tensor is, and can be given back while the tensor lives on."""
    has_inference_mode: ClassVar[bool] = True
    """torch.inference_mode takes views of tensors that were made outside it."""
    _steps_going_on: int = 0

    @classmethod
    @abstractmethod
    def probe(cls, *, asked: bool = False) -> Verdict:
        """Can this machine run the lane? Cheap, imports no torch.

        asked  the user named this lane: then a machine without its device may do, and every obstacle is told.
        """

    @abstractmethod
    def enter_process(self) -> Undo:
        """Make this process the lane's (imports kept out, environment); returns what takes it back."""

    def start_method(self, asked: str) -> str:
        """How data workers start where the script asks for multiprocessing's `asked`.

        As asked: a device's client and its threads do not live on in a forked process.
        """
        return asked

    @abstractmethod
    def device(self, local_rank: int = 0) -> torch.device:
        """The device of a rank on this host."""

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` with its parameters and buffers on this rank's device, what upstream noted on them included."""
        from nxdt_nemo.runtime.placing import place

        return place(module, self.device())

    @abstractmethod
    def device_count(self) -> int:
        """Devices of this host that ranks can be placed on."""

    @abstractmethod
    def name_of_device(self) -> str:
        """What the device calls itself."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Can a model train in this dtype here? float16 is out on every lane: it trains with loss scaling only, which
        this backend does not do."""
        import torch

        return dtype in (torch.float32, torch.bfloat16)

    @abstractmethod
    def total_memory(self) -> int:
        """Bytes that a device (cpu: this host or container) has."""

    @abstractmethod
    def memory(self) -> MemoryFigures:
        """This rank's memory now."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start MemoryFigures.peak anew."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when the device has done all it was given."""

    @abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seed the device's generator."""

    @abstractmethod
    def rng_state(self) -> torch.Tensor:
        """A copy of the device generator's state (a CPU tensor)."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Put the device's generator back into a state that rng_state gave."""

    def register_backend(self) -> None:  # noqa: B027 - most backends are torch's
        """Let torch.distributed know `backend`, where it is none of torch's; before ranks come up, or again."""

    @abstractmethod
    def init_ranks(
        self,
        rank: int,
        world: int,
        *,
        init_method: str | None = None,
        store: Store | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """Bring up torch.distributed with this lane's backend; does nothing when it is up as asked.

        Raises LaneError when it is up with another backend, rank or world, or when the launcher's RANK and
        WORLD_SIZE say otherwise.
        """

    def ranks_are_coming(self, rank: int, world: int) -> None:  # noqa: B027 - most lanes hear it in time in init_ranks
        """Which rank this process is going to be, before anything uses its device."""

    def ranks_are_up(self) -> None:  # noqa: B027 - most lanes have nothing to look at
        """Called on each rank once torch.distributed is up, whoever brought it up: what a lane then has to check."""

    @abstractmethod
    def close_ranks(self) -> None:
        """Take torch.distributed down and forget the groups."""

    @abstractmethod
    def groups(self, mesh: Sequence[Sequence[int]], name: str) -> Group:
        """Make every group of `mesh` (each rank of the world in exactly one, ascending) and return this rank's.

        All ranks call it with the same mesh, in the same order. Raises ValueError naming what is wrong with it.
        """

    @abstractmethod
    def world(self) -> Group:
        """The group of all ranks."""

    @abstractmethod
    def group_of(self, process_group: dist.ProcessGroup) -> Group:
        """The Group around a torch ProcessGroup, upstream's own included.

        Of a group that was noted the mesh is whole, once all of its name are made; of another it is only itself.
        """

    @abstractmethod
    def note_group(self, name: str, ranks: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        """Upstream has made a group; every rank says so for every group, in the same order, None outside it."""

    @abstractmethod
    def close_meshes(self) -> None:
        """Upstream's parallel state is destroyed: groups noted from now on make meshes of their own."""

    @property
    @abstractmethod
    def ops(self) -> Ops:
        """The raw collectives of this lane; shared by its groups."""

    @abstractmethod
    def shard(self, tensor: torch.Tensor, dim: int, group: Group) -> torch.Tensor:
        """This rank's equal part of `tensor` along `dim`. Raises ValueError if it cannot be cut equally."""

    @abstractmethod
    def premul_sum(self, factor: float) -> PremulSum:
        """The reduction "multiply by factor, then sum", for all_reduce."""

    @abstractmethod
    def all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> dist.Work | None:
        """torch.distributed.all_reduce for upstream's calls: takes premul_sum, and is done when it returns."""

    @abstractmethod
    def coalescing(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None, async_ops: bool = False
    ) -> AbstractContextManager[Any]:
        """torch.distributed._coalescing_manager for upstream's calls."""

    @abstractmethod
    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Return when all ranks of the group, or of the world, are here."""

    @property
    def emulates_rounding(self) -> bool:
        """Is stochastic rounding asked for, and this lane's device has none? See rounding.py."""
        return False

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What upstream marks for a fusing compiler (megatron-core's jit_fuser), as this lane has it: as it stands."""
        return function

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """torch.matmul for upstream's calls: a linear layer's input and its transposed weight among others."""
        import torch

        return torch.matmul(a, b)

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """x, a transposed matrix [M, N]; or a copy, where a product with a matrix that is not transposed is faster."""
        return x

    def step_boundary(self) -> None:  # noqa: B027 - an eager lane has traced nothing
        """The end of a training step: a traced lane cuts its graph here."""

    def optimizer_stepped(self) -> None:
        """megatron-core's optimizer has stepped: a step_boundary, but in a loop that calls step_boundary itself."""
        if not self._steps_going_on:
            self.step_boundary()

    @contextmanager
    def step_goes_on(self) -> Iterator[None]:
        """Within it an optimizer's step is not yet the end of the training step: the caller says where that is."""
        self._steps_going_on += 1
        try:
            yield
        finally:
            self._steps_going_on -= 1

    def cut(self) -> None:  # noqa: B027 - an eager lane has nothing traced
        """Hand over what was traced, in a graph of its own: before and after what is no part of a step.

        No end of a step: nothing that was deferred is answered, and random numbers go on as if it were not there.
        """

    def optimization_barrier_(self, tensors: Sequence[torch.Tensor]) -> None:  # noqa: B027 - an eager lane merges nothing
        """Make what is computed from `tensors` later no common subexpression of what was computed from them before,
        and let it begin when all of them are there. In place; XLA's opt-barrier."""

    def unread(self) -> AbstractContextManager[Any]:
        """Within it a function runs again for its gradients: a traced lane sends nothing there that nobody reads."""
        return nullcontext()

    def reading(self) -> AbstractContextManager[Any]:
        """Within it the host reads tensors between operations: a traced lane computes nothing twice for that."""
        return nullcontext()

    def settle(self) -> None:  # noqa: B027 - an eager lane has nothing waiting
        """Call what defer was given and has not called yet: before a checkpoint is written, and at the end."""

    def salvage(self) -> None:  # noqa: B027 - an eager lane has nothing waiting
        """After an error, as settle, of what the device has been given only: the step that was cut short is left out.

        Its graph would be one more to compile, with collectives that other ranks do not come to.
        """

    def defer(self, function: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Call function(*values) with the tensors' values on the host, when they are there.

        An eager lane: at once. A traced one calls it at a later step_boundary, so that reading a loss costs no wait.
        """
        function(*(tensor.detach().cpu() for tensor in tensors))
