"""Stubs: modules and symbols that exist so that an import succeeds, and raise NotOnNeuron when used.

Room patching/ (leaf). May import nxdt_nemo.errors. Proof: tests/patching/test_stubs.py.

A stubbed symbol is a class: isinstance asks and gets False, annotations and base classes work,
and a call or an attribute raises. Names with a leading underscore answer AttributeError, because
that is how inspect, pickle and torch probe an object.
"""

from __future__ import annotations

from abc import ABCMeta
from types import ModuleType
from typing import Any, NoReturn

from nxdt_nemo.errors import NotOnNeuron

__all__ = ["StubModule", "StubType", "stub_symbol"]


class StubType(ABCMeta):
    """The class of stubbed symbols; an ABCMeta, so that they may stand beside abstract bases."""

    _stub_name: str
    _stub_why: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotOnNeuron(f"{cls._stub_name} is not available on Neuron: {cls._stub_why}")

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(f"{cls._stub_name} is a stub and has no {name}")
        raise NotOnNeuron(f"{cls._stub_name}.{name} is not available on Neuron: {cls._stub_why}")


def stub_symbol(name: str, why: str) -> StubType:
    """A stub for the symbol of this full dotted name."""
    module, _, short = name.rpartition(".")
    return StubType(short, (), {"__module__": module, "_stub_name": name, "_stub_why": why})


class StubModule(ModuleType):
    """A module in which every public name is a stub; a package, so that what lies below can be asked for."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, f"Stub: {why}")
        self.__path__: list[str] = []
        self._why = why

    def __getattr__(self, name: str) -> StubType:
        if name.startswith("_"):
            raise AttributeError(f"{self.__name__} is a stub and has no {name}")
        symbol = stub_symbol(f"{self.__name__}.{name}", self._why)
        setattr(self, name, symbol)  # the same object the next time
        return symbol

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """`from package import name` makes a module of an absent name, and upstream may call it."""
        raise NotOnNeuron(f"{self.__name__} is not available on Neuron: {self._why}")
