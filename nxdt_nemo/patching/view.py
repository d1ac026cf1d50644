"""What upstream modules see when they import torch, apex or TransformerEngine.

Room patching/, a leaf: replacements are named as strings. CPython looks `__import__` up in the builtins of
the module that runs the import statement, so a module that is given its own `__builtins__` before it is
executed gets our answer, and nobody else in the process does. Which modules, and which answers, stands in
patches/views.toml. Proof: tests/patching/test_view.py.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Protocol

from nxdt_nemo import console
from nxdt_nemo.errors import PatchError

__all__ = ["Absent", "ModuleView", "Overlay", "Redirect", "StandIn", "Views", "load_object"]

# Attributes that may be copied into a view once: they do not change while a program runs.
_STABLE = (type, FunctionType, BuiltinFunctionType, ModuleType)


def load_object(path: str) -> Any:
    """The object that "package.module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class ModuleView(ModuleType):
    """A module with some names replaced; every other name is the real module's, read and written."""

    def __init__(self, real: ModuleType, overlay: Mapping[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        state = self.__dict__
        state.update(_real=real, _names=frozenset(overlay), **overlay)
        for name in ("__file__", "__path__", "__spec__", "__loader__", "__package__"):
            if hasattr(real, name):
                state[name] = getattr(real, name)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_real"], name)
        if isinstance(value, _STABLE) and not name.startswith("__"):
            self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            self.__dict__.pop(name, None)
        setattr(self.__dict__["_real"], name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(name, None)
        delattr(self.__dict__["_real"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self.__dict__["_real"]), *self._names})

    def disable(self) -> None:
        """From now on every name is the real module's: modules that hold this view see upstream again."""
        for name in self._names:
            value = self.__dict__.pop(name, None)
            if isinstance(value, ModuleView):
                value.disable()


ImportFunction = Callable[..., Any]


class Redirect(Protocol):
    """Answers an import statement of one top-level name."""

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str]) -> Any:
        """As `__import__(name, fromlist=fromlist)` answers."""

    def disable(self) -> None:
        """The views that were handed out show upstream again."""


class Overlay:
    """`import torch` yields a view; `factory(scope)` names its table, called at the first import."""

    def __init__(self, factory: str, scope: str) -> None:
        self._factory, self._scope = factory, scope
        self._view: ModuleView | None = None

    def _top(self, real: ModuleType) -> ModuleView:
        if self._view is None:
            self._view = load_object(self._factory)(real, self._scope)
        return self._view

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str]) -> Any:
        found = original(name, None, None, fromlist, 0)
        top, _, rest = name.partition(".")
        view: Any = self._top(sys.modules[top])
        if not fromlist or not rest:
            return view
        for part in rest.split("."):
            view = getattr(view, part, None)
        return view if isinstance(view, ModuleView) else found

    def disable(self) -> None:
        if self._view is not None:
            self._view.disable()


class StandIn:
    """`import apex` yields our package; a real one beside us is shadowed with one notice."""

    def __init__(self, name: str, package: str) -> None:
        self._name, self._package = name, package

    def _say_if_shadowed(self) -> None:
        spec = importlib.machinery.PathFinder.find_spec(self._name)
        if spec is not None:
            console.once(f"the installed {self._name} is not used by NeMo and Megatron here ({self._package} is)")

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str]) -> Any:
        self._say_if_shadowed()
        ours = self._package + name[len(self._name) :]
        try:
            found = original(ours, None, None, fromlist, 0)
        except ModuleNotFoundError as error:
            if error.name is None or not ours.startswith(error.name):
                raise
            raise ModuleNotFoundError(f"No module named {name!r}", name=name) from error
        return found if fromlist else sys.modules[self._package]

    def disable(self) -> None:
        """Nothing was handed out that has a real counterpart."""


class Absent:
    """`import transformer_engine` fails as if it were not installed, with one notice where it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str]) -> Any:
        if importlib.machinery.PathFinder.find_spec(self._name) is not None:
            console.once(f"the installed {self._name} needs CUDA and is not used here")
        raise ModuleNotFoundError(f"No module named {name!r} (it needs CUDA)", name=name)

    def disable(self) -> None:
        """Nothing was handed out."""


class Views:
    """All redirects, by scope ("upstream" for megatron.* and nemo.*, "main" for the user's script)."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """`table` is patches/views.toml: [scope] lists of top-level names, [[redirect]] entries."""
        self.scopes: dict[str, frozenset[str]] = {key: frozenset(names) for key, names in table["scope"].items()}
        self._redirects: dict[str, dict[str, Redirect]] = {scope: {} for scope in self.scopes}
        self.active = True
        self._import = builtins.__import__
        for entry in table["redirect"]:
            for scope in self.scopes:
                self._redirects[scope][entry["name"]] = self._redirect(entry, scope)

    @staticmethod
    def _redirect(entry: Mapping[str, Any], scope: str) -> Redirect:
        kind, name = entry["kind"], entry["name"]
        if kind == "overlay":
            return Overlay(entry["replacement"], scope)
        if kind == "stand-in":
            return StandIn(name, entry["replacement"])
        if kind == "absent":
            return Absent(name)
        raise PatchError(f"patches/views.toml: redirect {name!r} has unknown kind {kind!r}")

    def scope_of(self, module: str) -> str | None:
        """The scope that a module's name falls into, if any."""
        top = module.partition(".")[0]
        return next((scope for scope, names in self.scopes.items() if top in names), None)

    def import_for(self, scope: str) -> ImportFunction:
        """An `__import__` that answers with this scope's views while the backend is active."""
        redirects, real = self._redirects[scope], self._import

        def __import__(  # noqa: A001, N807 - its name shows in tracebacks and is what it stands in for
            name: str,
            globals: Mapping[str, Any] | None = None,  # noqa: A002
            locals: Mapping[str, Any] | None = None,  # noqa: A002
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> Any:
            if level == 0 and self.active:
                redirect = redirects.get(name.partition(".")[0])
                if redirect is not None:
                    return redirect.answer(real, name, fromlist or ())
            return real(name, globals, locals, fromlist, level)

        return __import__

    def builtins_for(self, scope: str) -> dict[str, Any]:
        """What a module of this scope gets as `__builtins__` before it is executed."""
        return {**vars(builtins), "__import__": self.import_for(scope)}

    def disable(self) -> None:
        """Every view shows upstream again, in modules that were imported already too."""
        self.active = False
        for redirects in self._redirects.values():
            for redirect in redirects.values():
                redirect.disable()
