"""Pickles read as data: an allow-list of names, and inert stand-ins for the classes of known packages.

Room checkpoint/ (leaf). torch's weights_only is too strict for Megatron's files, which hold an argparse.Namespace and
enums, and plain pickle runs whatever the file says. Here a name stands for
  - a function of ours that can only build tensors, numpy arrays and builtin containers,
  - an `Inert` class, if its package is one of those that write checkpoints: it keeps what it was given, does nothing,
  - else nothing: UserError with the name. No module is imported on a file's word.
May import the standard library, numpy and this room. Proof: tests/checkpoint/test_unpickle.py.
"""

from __future__ import annotations

import argparse
import codecs
import io
import pathlib
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nxdt_nemo.checkpoint.dtypes import BY_NAME, DType
from nxdt_nemo.checkpoint.io.files import Extent
from nxdt_nemo.errors import UserError, one_line

__all__ = ["Device", "Global", "Inert", "NumpyArray", "PathText", "StorageRef", "dense", "inert", "load", "plain"]

# Packages whose classes are found in checkpoints. Their names become Inert, nothing of them is imported.
_PACKAGES = frozenset(
    "megatron nemo omegaconf lightning pytorch_lightning lightning_fabric transformer_engine modelopt fiddle torch_xla "
    "neuronx_distributed neuronx_distributed_training apex transformers tokenizers sentencepiece nv_one_logger".split()
)
# And the one class of this package: the mark of main parameters that are copies.
_MARK = "nxdt_nemo.megatron.tensor_parallel.kv_heads.KVHeads"

_TORCH_DATA = ("torch.distributed.checkpoint.", "torch.distributed._shard.")


@dataclass(frozen=True)
class Global:
    """A name in a pickle that stands for itself: a class or function that is not imported."""

    module: str
    name: str

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("stands for a name, and is not called")


class Inert:
    """An object of a class that is not imported. Holds arguments, state and items as they were in the file.

    Two are never equal unless they are the same object, which is enough to be a key.
    """

    module = name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = object.__new__(cls)
        made.__dict__.update(arguments=args, state=None, items=[])
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def append(self, item: Any) -> None:
        self.__dict__["items"].append(item)

    def extend(self, items: Any) -> None:
        self.__dict__["items"].extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["items"].append((key, value))

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the state, as a dataclass or a plain object pickles it."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"{type(self).name}({', '.join(map(repr, self.arguments))})"


@dataclass(frozen=True)
class StorageRef:
    """A torch storage that lies in a file: `extent` is all of it, one-dimensional."""

    extent: Extent


def load(
    data: bytes, place: str, storage: Callable[[Any], StorageRef] | None = None, also: dict[str, Any] | None = None
) -> Any:
    """The object that a pickle holds.

    storage  answers the pickle's references to torch storages
    also     further names, as "module.name", and what stands for them
    Raises UserError naming `place` for a name that is not on the list and for a damaged pickle.
    """
    try:
        return _Unpickler(data, place, storage, also or {}).load()
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("its pickle is nested too deeply", place=place) from error
    except Exception as error:
        reason = f"its pickle cannot be read: {one_line(error)}"
        raise UserError(reason, place=place, fix="the file is damaged") from error


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, place: str, storage: Callable[[Any], StorageRef] | None, also: dict[str, Any]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._place, self._storage, self._also = place, storage, also
        self._classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full in self._also:
            return self._also[full]
        if full in _KNOWN:
            return _KNOWN[full]
        if module == "torch" and name.endswith("Storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in BY_NAME:
            return BY_NAME[name]
        if module == "torch" and name in _OTHER_DTYPES:
            return Global(module, name)
        known = module.partition(".")[0] in _PACKAGES or module.startswith(_TORCH_DATA) or full == _MARK
        if known and all(word.isidentifier() for word in full.split(".")):
            return self._classes.setdefault((module, name), inert(module, name))
        raise UserError(
            f"its pickle asks for {full}, which could run code",
            place=self._place,
            fix="do not load this file elsewhere unless you trust who made it",
        )

    def persistent_load(self, reference: Any) -> StorageRef:
        if self._storage is None:
            raise UserError("its pickle refers to data that is not in the file", place=self._place)
        return self._storage(reference)


def inert(module: str, name: str) -> type[Inert]:
    """The class that stands for one of this name."""
    return type(name.rpartition(".")[2], (Inert,), {"module": module, "name": name})


@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and its kin."""

    name: str
    dtype: DType


_STORAGES = {
    dtype.storage: StorageType(dtype.storage, dtype) for dtype in BY_NAME.values() if dtype.storage != "UntypedStorage"
}
_STORAGES["UntypedStorage"] = StorageType("UntypedStorage", BY_NAME["uint8"])
_OTHER_DTYPES = frozenset(
    "complex32 complex64 complex128 uint16 uint32 uint64 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu".split()
)


def _tensor(storage: StorageRef, offset: int, size: Any, stride: Any, *_: Any, dtype: Any = None) -> Extent:
    """torch._utils._rebuild_tensor_v2: an Extent with the tensor's shape, or an error if it leaves the storage."""
    base = storage.extent
    dtype = dtype or base.dtype
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if offset < 0 or len(size) != len(stride) or any(n < 0 for n in (*size, *stride)):
        raise UserError(f"a tensor with size {size}, stride {stride}, offset {offset}", place=base.place)
    count = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    if (offset + count) * dtype.itemsize > base.nbytes:
        raise UserError(f"a tensor of size {size} leaves its storage of {base.nbytes} bytes", place=base.place)
    plain = stride == dense(size)
    return Extent(base.file, base.key, dtype, size, base.offset + offset * dtype.itemsize, None if plain else stride)


def _tensor_v3(storage: StorageRef, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any) -> Extent:
    return _tensor(storage, offset, size, stride, dtype=dtype)


def dense(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor in C order, in elements."""
    strides, step = [], 1
    for n in reversed(size):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _first(value: Any, *_: Any) -> Any:
    """A parameter is its tensor."""
    return value


def _encode(text: str, encoding: str = "latin1", errors: str = "strict") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError(f"encoding {encoding}")
    return codecs.encode(text, encoding, errors)


def _bytearray(*args: Any) -> bytearray:
    if args and isinstance(args[0], int):
        raise ValueError("bytearray of a given size")
    return bytearray(*args)


class NumpyArray:
    """numpy.core.multiarray._reconstruct; the array is made by the state that follows."""

    value: np.ndarray[Any, Any] | None = None

    def __new__(cls, *_: Any) -> NumpyArray:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        dtype = dtype.value
        if not isinstance(data, bytes) or dtype.hasobject:
            raise ValueError("a numpy array of objects")
        self.value = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


class _NumpyType:
    """numpy.dtype, of plain numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        self.value = np.dtype(str(code))

    def __setstate__(self, state: Any) -> None:
        if len(state) > 1 and state[1] in (">", "<"):
            self.value = self.value.newbyteorder(state[1])


def _scalar(dtype: _NumpyType, data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype.value)[0].item()


def _getattr(owner: Any, name: str) -> Any:
    """How some versions of Python pickle a member of an enum."""
    if not (isinstance(owner, type) and issubclass(owner, Inert)):
        raise ValueError("getattr of what is no enum")
    return owner(name)


def _bytes_io(*args: Any) -> io.BytesIO:
    return io.BytesIO(*(arg for arg in args if isinstance(arg, bytes)))


class Device:
    """torch.device, as its arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def original(self) -> tuple[Any, ...]:
        """How it is pickled."""
        return Global("torch", "device"), self.arguments


class PathText(str):
    """pathlib.Path, as text."""

    def __new__(cls, *parts: str) -> PathText:
        return super().__new__(cls, str(pathlib.PurePosixPath(*map(str, parts))))

    def original(self) -> tuple[Any, ...]:
        """How it is pickled."""
        return pathlib.PosixPath, (str(self),)


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(int(n) for n in values)


_KNOWN: dict[str, Any] = {
    **{  # protocol 2, which torch.save writes, has Python 2's name of the module
        f"{module}.{t.__name__}": t
        for module in ("builtins", "__builtin__")
        for t in (set, frozenset, slice, complex, list, dict, tuple, int, float, str, bool)
    },
    "__builtin__.long": int,
    "__builtin__.unicode": str,
    "builtins.bytearray": _bytearray,
    "__builtin__.bytearray": _bytearray,
    "builtins.getattr": _getattr,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "collections.deque": deque,
    "collections.defaultdict": lambda *_: defaultdict(),
    "argparse.Namespace": argparse.Namespace,
    "_codecs.encode": _encode,
    "_io.BytesIO": _bytes_io,
    "io.BytesIO": _bytes_io,
    "pathlib.PosixPath": PathText,
    "pathlib.PurePosixPath": PathText,
    "torch.Size": _size,
    "torch.device": Device,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: function(*arguments),
    "torch.serialization._get_layout": lambda name: name,
    "numpy.core.multiarray._reconstruct": NumpyArray,
    "numpy._core.multiarray._reconstruct": NumpyArray,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.ndarray": "numpy.ndarray",
    "typing.Any": "typing.Any",
    "torch.Tensor": "torch.Tensor",
    "torch.nn.parameter.Parameter": "torch.nn.parameter.Parameter",
    "numpy.dtype": _NumpyType,
}
for _name in ("float64", "float32", "int64", "int32", "uint32", "uint8", "bool_"):
    _KNOWN[f"numpy.{_name}"] = getattr(np, _name)


def plain(value: Any) -> Any:
    """What `load` gave as things that print and turn into JSON: arrays as lists, inert objects as their text."""
    if isinstance(value, NumpyArray):
        return value.value.tolist() if value.value is not None else None
    if isinstance(value, argparse.Namespace):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [plain(item) for item in value]
    if isinstance(value, (DType, Global)):
        return value.name
    if isinstance(value, Extent):
        return f"tensor {list(value.shape)} {value.dtype}"
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
