"""Pickles written without the classes that they name, and with tensors whose bytes come later.

Room checkpoint/ (leaf). An `Inert` object that io/unpickle.py read is written back as the class it stands for, so
that Megatron's own arguments survive a conversion in a process without Megatron. May import torch and this room.
Proof: tests/checkpoint/test_torch_zip.py.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._utils

from nxdt_nemo.checkpoint.io.files import Extent
from nxdt_nemo.checkpoint.io.unpickle import Device, Inert, NumpyArray, PathText, dense

__all__ = ["Makes", "Pending", "dumps"]

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class Makes(Protocol):
    """What can give a tensor when it is asked for it."""

    def tensor(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Given:
    value: torch.Tensor

    def tensor(self) -> torch.Tensor:
        return self.value


@dataclass(frozen=True)
class Pending:
    """A tensor to be saved: what makes it, its dtype, shape and bytes."""

    what: Makes
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, made: Any) -> Pending:
        """Of a tensor, of what makes one and knows its dtype, shape and bytes, or itself."""
        if isinstance(made, Pending):
            return made
        what = _Given(made) if isinstance(made, torch.Tensor) else made
        return cls(what, made.dtype, tuple(made.shape), made.nbytes)


class _Storage:
    def __init__(self, number: int, pending: Pending) -> None:
        self.number, self.pending = number, pending


_Base: Any = pickle._Pickler


class _Pickler(_Base):
    """The Python pickler, since the one in C wants to import what it names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Pending] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            pending = obj.pending
            count = pending.nbytes // pending.dtype.itemsize
            return ("storage", _STORAGES[pending.dtype], str(obj.number), "cpu", count)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (Pending, Extent, torch.Tensor)):
            pending = Pending.of(obj)
            self.tensors.append(pending)
            storage = _Storage(len(self.tensors) - 1, pending)
            arguments: tuple[Any, ...] = (storage, 0, pending.shape, dense(pending.shape), False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments
        if isinstance(obj, NumpyArray) and obj.value is not None:
            return obj.value.__reduce__()
        if isinstance(obj, (Device, PathText)):
            return obj.original()
        if isinstance(obj, Inert):
            return type(obj), obj.arguments, obj.state, None, None
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, Inert) and obj is not Inert:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def dumps(value: Any) -> tuple[bytes, list[Pending]]:
    """The pickle, and the tensors that it refers to as storages 0, 1, ..."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors
