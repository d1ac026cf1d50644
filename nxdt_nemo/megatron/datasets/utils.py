"""The compiled helpers of megatron-core's data sets.

Room megatron/. Stands in for one function of megatron.core.datasets.utils. Proof: tests/megatron/test_utils.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

from nxdt_nemo.patching.view import Views

__all__ = ["compile_helpers", "lend_compiled"]

COMPILED = tuple(f"helpers_cpp{ending}" for ending in EXTENSION_SUFFIXES)  # as this Python names it


def compile_helpers(original: Callable[[], None]) -> None:
    """Upstream's, where there is something to compile: the wheel brings the compiled module and no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        original()


def lend_compiled(package: ModuleType, views: Views) -> Callable[[], None]:
    """Let a checkout's megatron.core.datasets find the compiled module of the wheel that it shadows.

    A checkout of Megatron-LM would compile its own at the first start, on each node's first rank, which wants pybind11
    and a compiler. Only what the checkout itself lacks is looked for in the wheel.
    """
    path = package.__path__
    has_it = any(file.name in COMPILED for folder in path for file in Path(folder).iterdir())
    lent = None if has_it else _folder_of_the_wheel()
    if lent is None:
        return lambda: None
    path.append(lent)

    def take_back() -> None:
        if lent in path:
            path.remove(lent)

    return take_back


def _folder_of_the_wheel() -> str | None:
    try:
        files = distribution("megatron-core").files or []
    except PackageNotFoundError:
        return None
    for file in files:
        if file.name in COMPILED:
            return str(Path(str(file.locate())).parent)
    return None
