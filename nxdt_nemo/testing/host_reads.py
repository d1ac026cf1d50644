"""How often the host reads a tensor back.

Room testing/. On a device that runs ahead of the host each reading waits for all that is queued; on the cpu lane it
costs nothing, so that it has to be counted. Proof: tests/lightning/test_host_reads.py.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostReads"]

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)


class HostReads(TorchDispatchMode):
    """Inside the block: `count` readings (item, float(), bool(), tolist), `by_line` where they come from.

    Of this thread; a backward pass is not seen on other devices' threads. numpy() is a view on the cpu lane and
    does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_line: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.by_line.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            outside = (frame for frame in reversed(traceback.extract_stack()) if "/torch/" not in frame.filename)
            next(outside)  # this function
            frame = next(outside)
            self.by_line[f"{frame.filename}:{frame.lineno}"] += 1
        return function(*args, **(kwargs or {}))
