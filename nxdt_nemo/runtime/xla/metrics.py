"""What a traced step made the device do: the figures by which a lost graph shows.

Room runtime/. Reads torch_xla.debug.metrics. Proof: tests/megatron/test_xla.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met

__all__ = ["counters", "graphs_compiled", "since", "wait"]

METRICS = {"CompileTime": "compiled", "ExecuteTime": "executed", "TransferFromDeviceTime": "read"}


def counters() -> dict[str, int]:
    """Since the process began: graphs compiled and executed, tensors read back, and operations that fell off XLA by
    their aten names."""
    found = {short: int((met.metric_data(name) or (0,))[0]) for name, short in METRICS.items()}
    aten = {name: int(met.counter_value(name)) for name in met.counter_names() if name.startswith("aten::")}
    return found | {name: value for name, value in aten.items() if value}


def since(before: Mapping[str, int]) -> dict[str, int]:
    """What has been counted since `before`, an answer of counters; without what has not."""
    changed = {name: count - before.get(name, 0) for name, count in counters().items()}
    return {name: count for name, count in changed.items() if count}


def graphs_compiled() -> int:
    """Graphs of the program's own: CompileTime also has torch_xla's, that bring a sharded tensor to the host."""
    return int(met.counter_value("UncachedCompile") or 0)


def wait() -> None:
    """Return when what was handed over is done; an execution counts when it ends. Hands nothing over itself."""
    xm.wait_device_ops()
