"""Runs a script that imports neuronx-distributed or NNM, without Trainium: `stubs.py FOLDERS SCRIPT ARGUMENTS...`.

Imports of compilers and devices get modules whose attributes do nothing; of torch_xla there are the few lines that both
use for serialization, for tensors of the CPU, or it is the real one if NXDT_TEST_XLA is 1. FOLDERS are joined by the
system's path separator.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import runpy
import sys
import types
from typing import Any
from unittest import mock

import torch

ABSENT = {"torch_xla", "torch_neuronx", "libneuronxla", "neuronxcc", "nki", "boto3", "botocore", "s3transfer", "awscrt"}
ABSENT |= {"neuronx_distributed.trace", "neuronx_distributed.kernels", "nkilib", "tenacity", "neuronxlogger"}
if os.environ.get("NXDT_TEST_XLA") == "1":
    import torch_xla  # noqa: F401  # before the stubs: it asks whether there is a libneuronxla

    ABSENT -= {"torch_xla"}


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if any(name == absent or name.startswith(f"{absent}.") for absent in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Module(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__version__ = "2.9.0"
        if module.__name__ == "torch_xla.utils.serialization":
            module.__dict__.update(TensorReference=TensorReference, _get_tensors_folder=_folder, _get_tensor_file=_file)
            module.__dict__.update(save=save, load=load)
        if module.__name__ == "torch_xla.core.xla_model":
            module.__dict__.update(ToXlaTensorArena=Arena, xla_device=lambda *_: torch.device("cpu"))


class TensorReference:
    def __init__(self, tid: int) -> None:
        self.tid = tid


TensorReference.__module__ = "torch_xla.utils.serialization"


def _folder(path: str) -> str:
    return path + ".tensors"


def _file(path: str, number: int) -> str:
    return os.path.join(path, f"tensor_{number}.pt")


class Arena:
    """Collects what `select` takes, converts all at once, puts the results in their places."""

    def __init__(self, convert: Any, select: Any) -> None:
        self.convert, self.select = convert, select

    def transform(self, value: Any) -> Any:
        found: list[Any] = []
        self._walk(value, found.append)
        made = iter(self.convert(found))
        return self._walk(value, lambda _: next(made))

    def _walk(self, value: Any, do: Any) -> Any:
        if self.select(value):
            return do(value)
        if isinstance(value, dict):
            return {key: self._walk(item, do) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._walk(item, do) for item in value])
        return value


def save(data: Any, path: str, **_: Any) -> None:
    def convert(tensors: list[torch.Tensor]) -> list[TensorReference]:
        os.makedirs(_folder(path), exist_ok=True)
        for number, tensor in enumerate(tensors):
            torch.save(tensor.clone(), _file(_folder(path), number))
        return [TensorReference(number) for number in range(len(tensors))]

    torch.save(Arena(convert, lambda v: isinstance(v, torch.Tensor)).transform(data), path)


def load(path: str) -> Any:
    def convert(references: list[TensorReference]) -> list[torch.Tensor]:
        return [torch.load(_file(_folder(path), reference.tid)) for reference in references]

    return Arena(convert, lambda v: type(v) is TensorReference).transform(torch.load(path, weights_only=False))


if __name__ == "__main__":
    folders, script, *arguments = sys.argv[1:]
    sys.path[:0] = folders.split(os.pathsep)
    sys.meta_path.insert(0, _Finder())
    sys.argv = [script, *arguments]
    plain = torch.load
    torch.load = lambda *args, **named: plain(*args, **{"weights_only": False, **named})  # as torch was then
    runpy.run_path(script, run_name="__main__")
