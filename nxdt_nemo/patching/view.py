"""What upstream modules see when they import torch, apex or TransformerEngine.

Room patching/, a leaf: replacements are named as strings. CPython looks `__import__` up in the builtins of
the module that runs the import statement, so a module that is given its own `__builtins__` before it is
executed gets our answer, and nobody else in the process does. Which modules, and which answers, stands in
patches/views.toml. Proof: tests/patching/test_view.py.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any, Protocol

from nxdt_nemo import console
from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.lazy import Lazy

__all__ = ["Absent", "ModuleView", "Overlay", "Redirect", "StandIn", "Views", "load_object"]


def load_object(path: str) -> Any:
    """The object that "package.module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class ModuleView(ModuleType):
    """A module with some names replaced; every other name is the real module's, read and written."""

    def __init__(self, real: ModuleType, overlay: Mapping[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        state = self.__dict__
        state.update(_real=real, _overlay=dict(overlay), **overlay)
        for name in ("__file__", "__path__", "__spec__", "__loader__", "__package__"):
            if hasattr(real, name):
                state[name] = getattr(real, name)

    def __getattr__(self, name: str) -> Any:
        # Not kept here: other libraries replace torch's functions while a program runs.
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_real"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_real"], name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self.__dict__["_real"]), *self.__dict__["_overlay"]})

    def __reduce__(self) -> Any:
        # Pickled by value, a function of the user's script takes its globals along, `torch` among them.
        return importlib.import_module, (self.__name__,)

    def disable(self) -> None:
        """From now on every name is the real module's: modules that hold this view see upstream again."""
        for name, value in self.__dict__["_overlay"].items():
            self.__dict__.pop(name, None)
            if isinstance(value, ModuleView):
                value.disable()

    def enable(self) -> None:
        """Take a disable() back."""
        overlay = self.__dict__["_overlay"]
        self.__dict__.update(overlay)
        for value in overlay.values():
            if isinstance(value, ModuleView):
                value.enable()


ImportFunction = Callable[..., Any]


class Redirect(Protocol):
    """Answers an import statement of one top-level name."""

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str], asked_by: str) -> Any:
        """As `__import__(name, fromlist=fromlist)` answers in the module asked_by."""

    def disable(self) -> None:
        """The views that were handed out show upstream again."""

    def enable(self) -> None:
        """Take a disable() back."""


Factory = Callable[[ModuleType, str], ModuleView]


class Overlay:
    """`import torch` yields a view, which `factory(real, scope)` makes at the first import."""

    def __init__(self, factory: str | Factory, scope: str) -> None:
        self._factory, self._scope = factory, scope
        self._view: ModuleView | None = None

    def _top(self, real: ModuleType) -> ModuleView:
        if self._view is None:
            make: Factory = load_object(self._factory) if isinstance(self._factory, str) else self._factory
            self._view = make(real, self._scope)
        return self._view

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str], asked_by: str) -> Any:
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

    def enable(self) -> None:
        if self._view is not None:
            self._view.enable()


class _NothingHeld:
    """A redirect that hands out nothing with a real counterpart."""

    def disable(self) -> None:
        """Nothing to take back."""

    def enable(self) -> None:
        """Nothing to give again."""


def _say_if_shadowed(name: str, product: str, instead: str) -> None:
    """One notice for each product, whichever of its modules is asked for first."""
    if importlib.machinery.PathFinder.find_spec(name) is not None:
        console.once(f"the installed {name} is not used by NeMo and Megatron here ({instead})", key=f"shadow {product}")


class StandIn(_NothingHeld):
    """`import apex` yields our package; a real one beside us is shadowed with one notice."""

    def __init__(self, name: str, package: str, product: str) -> None:
        self._name, self._package, self._product = name, package, product

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str], asked_by: str) -> Any:
        _say_if_shadowed(self._name, self._product, f"{self._package} is")
        ours = self._package + name[len(self._name) :]
        try:
            found = original(ours, None, None, fromlist, 0)
        except ModuleNotFoundError as error:
            if error.name is None or not ours.startswith(error.name):
                raise
            raise ModuleNotFoundError(f"No module named {name!r}", name=name) from error
        return found if fromlist else sys.modules[self._package]


class Absent(_NothingHeld):
    """`import transformer_engine` fails as if it were not installed, with one notice where it is.

    nominal_in  modules that only ask whether it is there, before they name layers of it that we have: they get an
                empty module, and its submodules only where no name is taken from them
    instead     modules that get a stand-in, and its package
    """

    def __init__(
        self, name: str, product: str, nominal_in: Iterable[str] = (), instead: Mapping[str, str] | None = None
    ) -> None:
        self._name, self._product = name, product
        self._nominal_in = frozenset(nominal_in)
        self.instead = {module: StandIn(name, package, product) for module, package in (instead or {}).items()}

    def answer(self, original: ImportFunction, name: str, fromlist: Sequence[str], asked_by: str) -> Any:
        if asked_by in self.instead:
            return self.instead[asked_by].answer(original, name, fromlist, asked_by)
        _say_if_shadowed(self._name, self._product, "it needs CUDA")
        if asked_by in self._nominal_in and not fromlist:
            return _empty(name)
        raise ModuleNotFoundError(f"No module named {name!r} (it needs CUDA)", name=name)


def _executed(frame: FrameType | None) -> str:
    """The name of the module whose body runs: it asks, through whatever helper (NeMo's safe_import)."""
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _empty(name: str) -> ModuleType:
    """The top of a dotted name, as an import statement binds it."""
    top, _, rest = name.partition(".")
    module = ModuleType(top)
    if rest:
        setattr(module, rest.partition(".")[0], _empty(rest))
    return module


class Views:
    """All redirects, by scope ("upstream" for megatron.* and nemo.*, "main" for the user's script)."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """`table` is patches/views.toml: [scope] lists of top-level names, [[redirect]] and [[lazy]] entries."""
        self.lazy = Lazy(table.get("lazy", ()))
        self.scopes: dict[str, frozenset[str]] = {key: frozenset(names) for key, names in table["scope"].items()}
        self._redirects: dict[str, dict[str, Redirect]] = {scope: {} for scope in self.scopes}
        self.active = True
        self._import = builtins.__import__
        self._imports: dict[str, ImportFunction] = {scope: self._import_for(scope) for scope in self.scopes}
        for scope, redirects in self._redirects.items():
            redirects["importlib"] = Overlay(self._importlib, scope)
            for entry in table["redirect"]:
                redirects[entry["name"]] = self._redirect(entry, scope)

    @staticmethod
    def _redirect(entry: Mapping[str, Any], scope: str) -> Redirect:
        kind, name = entry["kind"], entry["name"]
        product = entry.get("part_of", name)
        if kind == "overlay":
            return Overlay(entry["replacement"], scope)
        if kind == "stand-in":
            return StandIn(name, entry["replacement"], product)
        if kind == "absent":
            return Absent(name, product, entry.get("nominal_in", ()), entry.get("instead"))
        raise PatchError(f"patches/views.toml: redirect {name!r} has unknown kind {kind!r}")

    def _importlib(self, real: ModuleType, scope: str) -> ModuleView:
        """importlib, which NeMo asks for TransformerEngine and its version: it answers as an import does."""
        redirects = self._redirects[scope]

        @functools.wraps(importlib.import_module)
        def import_module(name: str, package: str | None = None) -> ModuleType:
            redirect = redirects.get(name.partition(".")[0])
            if redirect is None or not self.active:
                return importlib.import_module(name, package)
            whole = ("__name__",) if "." in name else ()
            found: ModuleType = redirect.answer(self._import, name, whole, _executed(sys._getframe(1)))
            return found

        @functools.wraps(importlib.metadata.version)
        def version(distribution_name: str) -> str:
            redirect = redirects.get(distribution_name.replace("-", "_"))
            if scope == "upstream" and self.active and isinstance(redirect, Absent):
                return "0.0"  # NeMo asks whether it is new enough and has no case for none
            return importlib.metadata.version(distribution_name)

        metadata = ModuleView(importlib.metadata, {"version": version})
        return ModuleView(real, {"import_module": import_module, "metadata": metadata})

    def grant(self, name: str, modules: Iterable[str], package: str) -> None:
        """Let `import name`, of something absent, yield `package` in these modules."""
        for redirects in self._redirects.values():
            absent = redirects[name]
            if not isinstance(absent, Absent):
                raise ValueError(f"{name} is not absent")
            absent.instead.update(dict.fromkeys(modules, StandIn(name, package, name)))

    def scope_of(self, module: str) -> str | None:
        """The scope that a module's name falls into, if any."""
        top = module.partition(".")[0]
        return next((scope for scope, names in self.scopes.items() if top in names), None)

    def import_for(self, scope: str) -> ImportFunction:
        """An `__import__` that answers with this scope's views while the backend is active."""
        return self._imports[scope]

    def serves(self, module: ModuleType) -> bool:
        """Whether the module was executed with `__builtins__` that we gave it."""
        found = vars(module).get("__builtins__")
        return isinstance(found, dict) and found.get("__import__") in self._imports.values()

    def _import_for(self, scope: str) -> ImportFunction:
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
                    asked_by = globals.get("__name__") if globals else None
                    return redirect.answer(real, name, fromlist or (), asked_by or "")
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

    def enable(self) -> None:
        """Take a disable() back: modules that were imported under these views are in it again."""
        self.active = True
        for redirects in self._redirects.values():
            for redirect in redirects.values():
                redirect.enable()
