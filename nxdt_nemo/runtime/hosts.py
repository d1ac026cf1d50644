"""Process groups that carry host memory, whatever the lane's device is: for flags and checkpoints.

Room runtime/. Imports torch.distributed. Proof: tests/runtime/test_hosts.py.
"""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["carries_host_memory", "host_world"]

_BACKEND = "gloo"


def carries_host_memory(group: dist.ProcessGroup) -> bool:
    """Whether CPU tensors go through this group as they are."""
    return str(dist.get_backend(group)) == _BACKEND


def host_world() -> dist.ProcessGroup:
    """All ranks: the world's own group, or a new one beside it. Each rank has to call it, in the same order."""
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("the ranks are not up: call init_ranks first")
    return world if carries_host_memory(world) else dist.new_group(backend=_BACKEND)
