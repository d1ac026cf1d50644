"""The lane itself: TorchNeuron's device `neuron`, its random numbers, memory and process groups.

Room runtime/. Imports torch and torch_neuronx when used. Written against TorchNeuron's public description, run on a
stand-in only (docs/neuron.md): nobody has run it on Trainium. Proof: tests/runtime/test_neuron.py,
tests/megatron/test_neuron.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nxdt_nemo import console
from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.keep_out import keep_out
from nxdt_nemo.runtime.lane import MemoryFigures, Undo, Verdict
from nxdt_nemo.runtime.machine import ranks_placed_here
from nxdt_nemo.runtime.neuron.package import obstacles, version
from nxdt_nemo.runtime.ranks import RanksLane

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from nxdt_nemo.runtime.ops import Ops

__all__ = ["NeuronLane"]

COMPILE = "NXDT_NEMO_COMPILE"
CORES = "NEURON_RT_VISIBLE_CORES"
NUMBER = "NEURON_RT_NUM_CORES"


class NeuronLane(RanksLane):
    """Operations run one by one on a NeuronCore, as they are called; one process a core.

    TorchNeuron gives a rank its core when the process group comes up, and refuses one that used the device before:
    ranks come first where there are several.
    """

    name = "neuron"
    backend = "neuron"

    @classmethod
    def probe(cls, *, asked: bool = False) -> Verdict:
        """The first obstacle for `auto`, all of them for someone who asked for this lane."""
        found = obstacles(asked=asked)
        if found:
            return Verdict(False, "; ".join(found) if asked else found[0])
        return Verdict(True, f"TorchNeuron {version()}, on which nobody has tried it")

    def enter_process(self) -> Undo:
        """torch_xla stays out, which accelerate would load; `import torch` finds TorchNeuron by itself."""
        return keep_out("torch_xla")

    def device(self, local_rank: int = 0) -> torch.device:
        """The one device that this process has: a rank's core is the only one it sees."""
        return self._device

    @cached_property
    def _device(self) -> torch.device:
        import torch

        if not self._call("is_available"):
            raise LaneError(
                "torch.neuron.is_available() is False: no NeuronCore can be used",
                place="NXDT_NEMO_RUNTIME=neuron",
                fix="see what neuron-ls lists, or use cpu",
            )
        return torch.device("neuron", 0)  # not current_device(), which may start the runtime before the ranks

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of torch.neuron, or of torch_neuronx, where TorchNeuron has some of those."""
        for place in self._modules:
            function = getattr(place, name, None)
            if function is not None:
                return function(*arguments)
        raise LaneError(f"this TorchNeuron has no torch.neuron.{name}", fix="see docs/neuron.md for the versions")

    @cached_property
    def _modules(self) -> tuple[Any, Any]:
        """torch.neuron and torch_neuronx. torch loads TorchNeuron when it is imported, unless its autoload is off."""
        import torch

        package = import_module("torch_neuronx")
        return torch.get_device_module("neuron"), package

    def device_count(self) -> int:
        """Ranks that a launcher placed here, or the cores that are left to this process, or TorchNeuron's own count."""
        return ranks_placed_here() or _visible_cores() or int(self._call("device_count"))

    def name_of_device(self) -> str:
        return str(self._call("get_device_properties", self.device().index).name)

    def total_memory(self) -> int:
        return int(self._call("get_device_properties", self.device().index).total_memory)

    def memory(self) -> MemoryFigures:
        """Of TorchNeuron's caching allocator, once the device is done: it frees and takes as work is executed."""
        self.synchronize()
        allocated, reserved = int(self._call("memory_allocated")), int(self._call("memory_reserved"))
        return MemoryFigures(allocated, reserved, max(reserved, int(self._call("max_memory_reserved"))))

    def reset_peak_memory(self) -> None:
        self._call("reset_peak_memory_stats")

    def synchronize(self) -> None:
        self._call("synchronize")

    def manual_seed(self, seed: int) -> None:
        self._call("manual_seed", seed)

    def rng_state(self) -> torch.Tensor:
        state: torch.Tensor = self._call("get_rng_state")
        return state.cpu().clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self._call("set_rng_state", state)

    def register_backend(self) -> None:
        """TorchNeuron registers its process group when it is imported.

        Also gives this process its core, as TorchNeuron does where nobody has: NEURON_RT_VISIBLE_CORES=LOCAL_RANK.
        """
        if "LOCAL_RANK" in os.environ:
            os.environ.setdefault(CORES, os.environ["LOCAL_RANK"])
        import_module("torch_neuronx")

    def ranks_are_up(self) -> None:
        """Raises LaneError when TorchNeuron goes by another number than 0 for this process's core."""
        import torch.distributed as dist

        number = int(self._call("current_device"))
        if number != 0:
            raise LaneError(
                f"TorchNeuron placed rank {dist.get_rank()} on neuron:{number} of several that it sees",
                place=f"{CORES}={os.environ.get(CORES, '')}",
                fix="give each process one core",
            )
        self._check_generator()

    def _check_generator(self) -> None:
        """Say so if numbers are not drawn from the generator whose state Megatron's streams put back.

        An early TorchNeuron drew on the host and left torch.neuron's state where it was.
        """
        import torch

        before = self.rng_state()
        torch.rand(1, device=self.device())
        if torch.equal(self.rng_state(), before):
            console.once(
                "numbers drawn on the neuron device do not come from torch.neuron's generator: dropout differs between "
                "runs, and ranks of one tensor-parallel group may not agree; set the dropouts to 0",
                key="neuron generator",
            )
        self.set_rng_state(before)

    @cached_property
    def ops(self) -> Ops:
        from nxdt_nemo.runtime.gloo import table

        return table(self.device())

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """TorchNeuron's is the world's only: a smaller group's is a number that all of it add up."""
        import torch
        import torch.distributed as dist

        if group is None or group is dist.group.WORLD:
            dist.barrier()
            return
        one = torch.ones(1, device=self.device())
        dist.all_reduce(one, group=group)
        one.item()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By TorchNeuron's compiler where NXDT_NEMO_COMPILE=1, a graph for each shape; else operation by operation."""
        if os.environ.get(COMPILE, "0") != "1":
            return function
        import torch

        return torch.compile(function, backend=self.backend, dynamic=False)


def _visible_cores() -> int:
    """Cores that CORES ("0,2", "4-7") or NUMBER leaves to this process; 0 where neither says.

    Raises LaneError for a value that is neither.
    """
    cores, number = os.environ.get(CORES, ""), os.environ.get(NUMBER, "") or "0"
    if re.fullmatch(r"(\d+(-\d+)?)?(,(\d+(-\d+)?)?)*", cores) is None:
        raise LaneError("is no list of cores", place=f"{CORES}={cores}", fix="write it as in 0,2 or 4-7")
    if not number.isdecimal():
        raise LaneError("is no number of cores", place=f"{NUMBER}={number}", fix="write a number, or unset it")
    count = 0
    for part in filter(None, cores.split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count or int(number)
