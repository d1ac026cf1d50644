"""Placeholders for Apex features that this backend does not have.

Room apex/. Proof: tests/apex/test_absent.py.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import NotOnNeuron

__all__ = ["refuse", "unavailable"]


def refuse(name: str, instead: str = "") -> NoReturn:
    """Raise NotOnNeuron for the Apex feature `name`; `instead` says what to use."""
    raise NotOnNeuron(f"{name} does not exist on the neuron backend" + (f"; {instead}" if instead else ""))


def unavailable(name: str, instead: str = "") -> type[Any]:
    """A class that can be imported, subclassed and used in isinstance, and refuses to be called.

    It stands for functions too: a call raises NotOnNeuron with the full name.
    """

    class Absent:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            refuse(name, instead)

    Absent.__name__ = Absent.__qualname__ = name.rpartition(".")[2]
    return Absent
