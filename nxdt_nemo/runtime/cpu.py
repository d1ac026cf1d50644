"""The cpu lane: eager torch and gloo ranks, complete; the rehearsal of a Trainium job.

Room runtime/. Keeps torch_xla out of the process. Imports torch when used, so that it can be probed without.
Proof: tests/runtime/.
"""

from __future__ import annotations

import os
import platform
import re
from functools import cached_property
from typing import TYPE_CHECKING

from nxdt_nemo.runtime.environment import set_variable
from nxdt_nemo.runtime.keep_out import keep_out
from nxdt_nemo.runtime.lane import MemoryFigures, Undo, Verdict
from nxdt_nemo.runtime.machine import host_memory, process_memory, ranks_placed_here, reset_process_peak, text
from nxdt_nemo.runtime.neuron.package import AUTOLOAD, registers_itself
from nxdt_nemo.runtime.ranks import RanksLane

if TYPE_CHECKING:
    import torch

    from nxdt_nemo.runtime.ops import Ops

__all__ = ["CpuLane"]


class CpuLane(RanksLane):
    """Eager torch on the host's cores, one process a rank, gloo between them."""

    name = "cpu"
    backend = "gloo"
    ragged = True

    @classmethod
    def probe(cls, *, asked: bool = False) -> Verdict:
        return Verdict(True, "always there")

    def enter_process(self) -> Undo:
        """Libraries of devices stay out; `import torch` would fail where it is to load one of them by itself."""
        back = keep_out("torch_xla", "torch_neuronx")
        if not registers_itself():
            return back
        autoload = set_variable(AUTOLOAD, "0")

        def undo() -> None:
            autoload()
            back()

        return undo

    def start_method(self, asked: str) -> str:
        """fork in place of spawn, which upstream's scripts force for CUDA's sake and which imports all again.

        Safe here: the process holds no device; a worker touches no process group, so that gloo's threads are not
        missed; it runs torch on one thread (torch.utils.data sets that first), so that OpenMP's pool is not either.
        """
        return "fork" if asked == "spawn" and hasattr(os, "fork") else asked

    def device(self, local_rank: int = 0) -> torch.device:
        import torch

        return torch.device("cpu")

    def device_count(self) -> int:
        return ranks_placed_here() or os.cpu_count() or 1

    def name_of_device(self) -> str:
        found = re.search(r"model name\s*:\s*(.+)", text("/proc/cpuinfo"))
        return found[1].strip() if found else platform.machine()

    def supports(self, dtype: torch.dtype) -> bool:
        """Also float64, which is none of NeuronCores' own."""
        import torch

        return super().supports(dtype) or dtype == torch.float64

    def total_memory(self) -> int:
        return host_memory()

    def memory(self) -> MemoryFigures:
        return MemoryFigures(*process_memory())

    def reset_peak_memory(self) -> None:
        reset_process_peak()

    def synchronize(self) -> None:
        """An eager operation is done when it returns."""

    def manual_seed(self, seed: int) -> None:
        import torch

        torch.default_generator.manual_seed(seed)

    def rng_state(self) -> torch.Tensor:
        import torch

        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        import torch

        torch.set_rng_state(state)

    @property
    def emulates_rounding(self) -> bool:
        from nxdt_nemo.runtime.rounding import asked

        return asked()

    @cached_property
    def ops(self) -> Ops:
        from nxdt_nemo.runtime.gloo import table

        return table()
