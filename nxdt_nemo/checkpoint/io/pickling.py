"""Pickles written without the classes that they name, and with tensors whose bytes come later.

Room checkpoint/ (leaf). An `Inert` object that io/unpickle.py read is written back as the class it stands for, so
that Megatron's own arguments survive a conversion in a process without Megatron. May import numpy and this room.
Proof: tests/checkpoint/test_torch_zip.py.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nxdt_nemo.checkpoint.dtypes import FLOAT32, DType, Raw
from nxdt_nemo.checkpoint.io.files import Extent
from nxdt_nemo.checkpoint.io.unpickle import Device, Global, Inert, NumpyArray, PathText, dense

__all__ = ["STRIDED", "Makes", "Pending", "Size", "dumps", "scalar"]

_TENSOR, _SIZE = Global("torch._utils", "_rebuild_tensor_v2"), Global("torch", "Size")
_LAYOUT = Global("torch.serialization", "_get_layout")


class Makes(Protocol):
    """What can give a tensor when it is asked for it."""

    def tensor(self) -> Raw: ...


@dataclass(frozen=True)
class _Given:
    value: Raw

    def tensor(self) -> Raw:
        return self.value


@dataclass(frozen=True)
class Pending:
    """A tensor to be saved: what makes it, its dtype, shape and bytes."""

    what: Makes
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, made: Any) -> Pending:
        """Of what makes a tensor and knows its dtype, shape and bytes, or itself."""
        return made if isinstance(made, Pending) else cls(made, made.dtype, tuple(made.shape), made.nbytes)

    @classmethod
    def given(cls, array: Raw, dtype: DType) -> Pending:
        """Of a tensor that is there already."""
        return cls(_Given(array), dtype, array.shape, array.nbytes)


def scalar(value: float) -> Pending:
    """torch.tensor(value), a float32 without axes."""
    return Pending.given(np.array(value, FLOAT32.raw), FLOAT32)


class _Strided:
    """torch.strided, the layout of ordinary tensors."""


STRIDED = _Strided()


class Size(tuple[int, ...]):
    """torch.Size."""

    __slots__ = ()


class _Storage:
    def __init__(self, number: int, pending: Pending) -> None:
        self.number, self.pending = number, pending


_Base: Any = pickle._Pickler


class _Pickler(_Base):
    """The Python pickler, since the one in C wants to import what it names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Pending] = []
        self._texts: dict[str, str] = {}

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Equal texts are one object, or the file's size would depend on which of them Python has interned."""
        if type(obj) is str:
            obj = self._texts.setdefault(obj, obj)
        super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            pending = obj.pending
            count = pending.nbytes // pending.dtype.itemsize
            return ("storage", Global("torch", pending.dtype.storage), str(obj.number), "cpu", count)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Global):
            return obj.name
        if isinstance(obj, DType):
            return obj.name
        if isinstance(obj, _Strided):
            return _LAYOUT, ("torch.strided",)
        if isinstance(obj, Size):
            return _SIZE, (tuple(obj),)
        if isinstance(obj, (Pending, Extent)):
            pending = Pending.of(obj)
            self.tensors.append(pending)
            storage = _Storage(len(self.tensors) - 1, pending)
            arguments: tuple[Any, ...] = (storage, 0, pending.shape, dense(pending.shape), False, OrderedDict())
            return _TENSOR, arguments
        if isinstance(obj, NumpyArray) and obj.value is not None:
            return obj.value.__reduce__()
        if isinstance(obj, (Device, PathText)):
            return obj.original()
        if isinstance(obj, Inert) and not obj.arguments and obj.state is not None:
            return copyreg.__newobj__, (type(obj),), obj.state  # type: ignore[attr-defined]
        if isinstance(obj, Inert):
            return type(obj), obj.arguments, obj.state, None, None
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, DType):
            self._named(obj, "torch", obj.name)
        elif isinstance(obj, Global) or (isinstance(obj, type) and issubclass(obj, Inert) and obj is not Inert):
            self._named(obj, obj.module, obj.name)
        else:
            super().save_global(obj, name)

    def _named(self, obj: Any, module: str, name: str) -> None:
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)


def dumps(value: Any) -> tuple[bytes, list[Pending]]:
    """The pickle, and the tensors that it refers to as storages 0, 1, ..."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors
