"""Keeping a package out of this process, as if it were not installed.

Room runtime/. accelerate imports torch_xla whenever it is installed, which sets PJRT_DEVICE and takes seconds;
Lightning asks for its version and then imports it. Imports the standard library only.
Proof: tests/runtime/test_keep_out.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Any

from nxdt_nemo.errors import LaneError

__all__ = ["keep_out"]


class _Missing(MetaPathFinder):
    """Answers importlib.metadata before the finder that would find the distribution."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(_normal(name) for name in names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        name = getattr(context, "name", None)
        if name and _normal(name) in self.names:
            raise PackageNotFoundError(name)
        return ()


class _Undo:
    """Takes one keep_out back; a package stays out while another keep_out holds it."""

    def __init__(self, names: tuple[str, ...], finder: _Missing) -> None:
        self.names, self.finder = names, finder

    def __call__(self) -> None:
        if self.finder not in sys.meta_path:
            return
        sys.meta_path.remove(self.finder)
        held = {name for finder in sys.meta_path if isinstance(finder, _Missing) for name in finder.names}
        for name in self.names:
            if _normal(name) not in held and sys.modules.get(name, self) is None:
                del sys.modules[name]


def keep_out(*names: str) -> _Undo:
    """Make these top-level packages look uninstalled; the result, called, takes it back (twice is once).

    `import name` raises ModuleNotFoundError, importlib.util.find_spec gives None (that is what a None in
    sys.modules means to Python), importlib.metadata finds no distribution.
    Raises LaneError naming one that is loaded already.
    """
    for name in names:
        if sys.modules.get(name) is not None:
            raise LaneError(
                f"{name} is already loaded, and this lane keeps it out of the process",
                place="NXDT_NEMO_RUNTIME",
                fix=f"activate before anything imports {name} (accelerate does), or choose its lane",
            )
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    finder = _Missing(names)
    sys.meta_path.insert(0, finder)
    return _Undo(names, finder)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
