"""torch.distributed.new_group as torch has it.

Room runtime/. torch_xla puts a function of fewer arguments in its place, for everyone, when it is imported;
megatron-core calls it with all of them. Proof: tests/runtime/test_xla.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist

__all__ = ["give_back"]


def give_back(module: ModuleType, views: Any) -> Callable[[], None]:
    """Take torch_xla.distributed.xla_backend's new_group out; returns what puts it in again."""
    theirs = dist.new_group
    dist.new_group = module._orig_new_group_fn

    def undo() -> None:
        dist.new_group = theirs

    return undo
