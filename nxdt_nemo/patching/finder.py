"""The import hook: views before a module runs, patches right after, so that nobody binds a stale name.

Room patching/, a leaf. wrapt's post-import hooks come after execution only, and cannot be taken back;
a view has to be in place before. Proof: tests/patching/test_finder.py.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

from nxdt_nemo.patching.lazy import plain_builtins
from nxdt_nemo.patching.view import Views

__all__ = ["UpstreamFinder"]


class _Loader(importlib.abc.InspectLoader):
    """The real loader, with a step before and one after execution; steps aside once it is done.

    An InspectLoader, so that `python -m` and its like find the code of a module in scope through it.
    """

    def __init__(self, real: Any, finder: UpstreamFinder) -> None:
        self._real, self._finder = real, finder

    def __getattr__(self, name: str) -> Any:
        if name in ("_real", "_finder"):  # a copy that was not initialized
            raise AttributeError(name)
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._real.create_module(spec)
        return created

    def get_code(self, fullname: str) -> CodeType | None:
        code: CodeType | None = self._real.get_code(fullname)
        return code

    def get_source(self, fullname: str) -> str | None:
        source: str | None = self._real.get_source(fullname)
        return source

    def is_package(self, fullname: str) -> bool:
        return bool(self._real.is_package(fullname))

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._real
        module.__loader__ = self._real
        self._finder.before(module)
        self._real.exec_module(module)
        self._finder.after(module)


class UpstreamFinder(importlib.abc.MetaPathFinder):
    """Stands first on sys.meta_path while the backend is active.

    wanted    says of a module's full name whether it is the target of a patch
    after     called with each such module, and with each in a view's scope, once it has been executed
    absent    full names of modules to make up (kind "stub"), or None
    """

    def __init__(
        self,
        views: Views,
        wanted: Callable[[str], bool],
        after: Callable[[ModuleType], None],
        stub_for: Callable[[str], ModuleType | None],
    ) -> None:
        self._views, self._wanted, self._after, self._stub_for = views, wanted, after, stub_for

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        views = self._views
        if views.scope_of(fullname) is None and fullname not in views.lazy and not self._wanted(fullname):
            return None
        stub = self._stub_for(fullname)
        if stub is not None:
            return importlib.machinery.ModuleSpec(fullname, _Made(stub), origin="nxdt_nemo stub")
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module") and spec.origin is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def before(self, module: ModuleType) -> None:
        """Give a module of a scope its view of torch and apex, and a lazy importer its imports."""
        scope = self._views.scope_of(module.__name__)
        given = plain_builtins() if scope is None else self._views.builtins_for(scope)
        if module.__name__ in self._views.lazy:
            given = self._views.lazy.builtins_for(module, given)
        elif scope is None:
            return
        module.__dict__["__builtins__"] = given

    def after(self, module: ModuleType) -> None:
        """Unbind the names that wait; apply the records whose targets this module defines."""
        self._views.lazy.settle(module)
        if self._wanted(module.__name__):
            self._after(module)


class _Made(importlib.abc.Loader):
    """Loads a module that was made up."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Made whole already."""
