"""torch.distributed as megatron.*, nemo.* and the user's script see it: NCCL means the runtime's backend.

Room runtime/. Part of torch_view.py. What is a mistake of gloo's, and not a name of CUDA's, is in gaps.py and entered
where upstream calls it. Proof: tests/runtime/test_distributed_view.py.
"""

from __future__ import annotations

import functools
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nxdt_nemo.patching.view import ModuleView
from nxdt_nemo.runtime import gaps
from nxdt_nemo.runtime.select import current
from nxdt_nemo.runtime.unread import skippable

__all__ = ["distributed_view", "to_backend"]


def to_backend(name: Any) -> Any:
    """The lane's backend for a name that asks for NCCL ("nccl", "cpu:gloo,cuda:nccl"); else `name`."""
    if not isinstance(name, str) or not ("nccl" in name.lower() or current().alone):
        return name
    lane = current()
    lane.register_backend()
    return lane.backend


def _type(device_type: str) -> str:
    return current().device().type if device_type == "cuda" else device_type


class _DeviceMeshType(type):
    """`isinstance(x, DeviceMesh)` stays true for real meshes."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, DeviceMesh)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, DeviceMesh)


class _DeviceMesh(metaclass=_DeviceMeshType):
    """torch.distributed.DeviceMesh, with "cuda" meaning the runtime's device."""

    def __new__(cls, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:  # type: ignore[misc]
        return DeviceMesh(_type(device_type), *args, **kwargs)

    @staticmethod
    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        """As torch's."""
        return DeviceMesh.from_group(group, _type(device_type), *args, **kwargs)


class _P2POp(dist.P2POp):
    """torch.distributed.P2POp, which compares its function with torch's own isend."""

    def __new__(cls, op: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> dist.P2POp:  # type: ignore[misc]
        if op is gaps.isend:
            op, tensor = dist.isend, tensor.detach()
        return dist.P2POp(op, tensor, *args, **kwargs)


def _alone() -> None:
    """The addresses of a world of one, where no launcher gave any: `python script.py` is one rank."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@functools.wraps(dist.init_process_group)
def _init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
    kwargs.pop("device_id", None)  # NCCL's, to connect at once
    if not args and kwargs.get("init_method") in (None, "env://") and kwargs.get("store") is None:
        _alone()
    dist.init_process_group(to_backend(backend), *args, **kwargs)
    if dist.is_initialized() and dist.get_backend() == current().backend:
        current().ranks_are_up()


@functools.wraps(dist.new_group)
def _new_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
    return dist.new_group(ranks, timeout, to_backend(backend), *args, **kwargs)


@functools.wraps(init_device_mesh)
def _init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
    return init_device_mesh(_type(device_type), *args, **kwargs)


@functools.wraps(dist.all_gather_into_tensor)
def _all_gather_into_tensor(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> dist.Work | None:
    """NCCL counts elements; gloo wants shapes that go together, and upstream has others.

    For no elements NCCL meets nobody, and some callers count on it: NeMo 2.0 prints its timers on one rank only, and at
    the usual log level there are none.
    """
    if not output_tensor.numel() and not kwargs.get("async_op"):
        return None
    work: dist.Work | None = dist.all_gather_into_tensor(
        output_tensor.view(-1), input_tensor.reshape(-1), *args, **kwargs
    )
    return work


@functools.wraps(dist.barrier)
def _barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, **named: Any) -> dist.Work | None:
    """The lane's; device_ids are CUDA's, a timeout is torch's (2.14)."""
    if async_op or named:
        started: dist.Work | None = dist.barrier(group, async_op, **named)
        return started
    current().barrier(group)
    return None


def distributed_view() -> ModuleView:
    """torch.distributed for the modules that see the backend."""
    meshes = {"init_device_mesh": _init_device_mesh, "DeviceMesh": _DeviceMesh}
    return ModuleView(
        dist,
        meshes
        | {
            "init_process_group": _init_process_group,
            "new_group": _new_group,
            "all_gather_into_tensor": _all_gather_into_tensor,
            "all_reduce": skippable(dist, "all_reduce"),
            "all_to_all_single": skippable(dist, "all_to_all_single"),
            "reduce_scatter_tensor": skippable(dist, "reduce_scatter_tensor"),
            "barrier": _barrier,
            "all_gather": gaps.all_gather,
            "isend": gaps.isend,
            "P2POp": _P2POp,
            "reduce_scatter": gaps.reduce_scatter,
            "device_mesh": ModuleView(dist.device_mesh, meshes),
        },
    )
