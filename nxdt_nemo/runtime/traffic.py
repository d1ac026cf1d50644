"""Calls and bytes of everything that a rank sends, where its process groups are.

Room runtime/. Beside counting.py, which counts a lane's own table: upstream's layers, pipelines, gradient buffers and
norms call torch.distributed themselves, some by names that they bound at import. All of it, and the cpu lane's table
too, comes down to methods of torch's ProcessGroup, which are swapped on the class while somebody asks; so autograd's
threads, asynchronous calls and coalesced ones are seen, and nothing of this runs otherwise. Not seen: a backend whose
ProcessGroup has methods of its own (the xla lane's). Proof: tests/runtime/test_traffic.py.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CONTROL", "Sent", "Traffic", "count_traffic", "methods"]

# By method of ProcessGroup: the name in torch.distributed, and the place of the argument whose bytes count. Those in
# `_single` are what torch 2.14 calls; 2.9 has none of them.
_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "gather": ("gather", 1),
    "gather_single": ("gather", 1),
    "gather_into_tensor": ("gather", 1),
    "scatter": ("scatter", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
}
OBJECTS = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
)  # fmt: skip
RAGGED = {"all_gather": 0, "reduce_scatter": 1}
"""Of parts of unlike sizes, which gaps.py makes of an all-to-all for gloo: counted as what was asked for."""
CONTROL = frozenset({*OBJECTS, "barrier"})
"""What moves no tensor of the caller's. An object collective is counted under its own name, not that of its parts."""


@dataclass
class Sent:
    """calls, and bytes: the whole tensor's, as in counting.py, before what an algorithm makes of it.

    That is the output of an all-gather and of a scatter, what a send sends and a recv receives, and the input of all
    others. A barrier has none.
    places   bytes by the line that called, "file.py:123", outside of torch.distributed and of the runtime
    """

    calls: int = 0
    bytes: int = 0
    places: Counter[str] = field(default_factory=Counter)


GAPS = str(Path(__file__).with_name("gaps.py"))

Traffic = dict[tuple[str, str], Sent]
"""By collective ("all_gather") and name of the group ("TENSOR_MODEL_PARALLEL_GROUP", or what lane.groups was told)."""


def methods() -> dict[str, Any]:
    """What this torch's ProcessGroup has of the methods that are counted, by name."""
    from torch.distributed import ProcessGroup

    return {name: ProcessGroup.__dict__[name] for name in _METHODS if name in ProcessGroup.__dict__}


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process sends and receives inside the block, in groups of more than one rank."""
    from torch.distributed import ProcessGroup

    found: Traffic = {}
    lock = threading.Lock()
    before = methods()
    for name, method in before.items():
        setattr(ProcessGroup, name, _counted(method, *_METHODS[name], found, lock))
    try:
        yield found
    finally:
        for name, method in before.items():
            setattr(ProcessGroup, name, method)


def _counted(
    method: Callable[..., Any], collective: str, place: int | None, found: Traffic, lock: threading.Lock
) -> Callable[..., Any]:
    inside = _inside()

    @functools.wraps(method)
    def call(group: Any, *args: Any, **named: Any) -> Any:
        if group.size() > 1:
            part_of, where = _caller(inside)
            whole = RAGGED.get(part_of, place)
            sent = 0 if whole is None else _bytes([*args, *named.values()][whole])
            with lock:
                count = found.setdefault((part_of or collective, group.group_desc), Sent())
                count.calls += 1
                count.bytes += sent
                count.places[where] += sent
        return method(group, *args, **named)

    return call


def _bytes(given: Any) -> int:
    """Of a tensor, a list of them, or a list of lists."""
    return int(given.nbytes) if hasattr(given, "nbytes") else sum(_bytes(one) for one in given)


def _inside() -> tuple[str, ...]:
    """Files of torch.distributed and of the runtime, and what a context manager's exit runs through."""
    import torch.distributed

    return str(Path(torch.distributed.__file__).parent), str(Path(__file__).parent), contextlib.__file__


def _caller(inside: tuple[str, ...]) -> tuple[str, str]:
    """The collective of objects, or of parts of unlike sizes, that a call is a part of, "" if it is none, and the line
    that asked for it."""
    part_of, frame = "", sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        name, own = frame.f_code.co_name, frame.f_code.co_filename == GAPS
        if name in OBJECTS or (own and name in RAGGED):
            part_of = name
        frame = frame.f_back
    return part_of, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
