"""Imports put off until a name is used: what re-exporting packages pull in and a script never touches.

Room patching/, a leaf. patches/views.toml lists under [[lazy]] a module and the modules whose import in it waits;
no other importer sees a difference, and who imports such a module himself gets it at once. A name that waits is
not bound: a use inside the importer ends in `__missing__` of its builtins, one from outside in its `__getattr__`
(PEP 562), and both do then what the statement would have done. Not put off: a module that is not installed (its
ImportError comes at the statement), `import a.b`, a star, a name that hides the module it comes from.
Until its own module is complete a name is bound to a `Waiting`, which loads when it is used; one that upstream keeps
in a container would stay there, so such a statement must not be listed (the test looks for them).
Proof: tests/patching/test_lazy.py.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["Lazy", "LazyBuiltins", "Waiting"]

ImportFunction = Callable[..., Any]


class Waiting:
    """Stands for a name between its import statement and the end of its module; does the import if used there."""

    __slots__ = ("_load",)

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def resolve(self) -> Any:
        """What the import statement would have bound. Raises ImportError as it would."""
        return self._load()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._load()(*args, **named)

    def __bool__(self) -> bool:
        return bool(self._load())

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._load())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._load(),)


class _Source:
    """What `from module import name` asks for its names."""

    def __init__(self, owner: str, module: str, real: ImportFunction) -> None:
        self._owner, self._module, self._real = owner, module, real

    def __getattr__(self, name: str) -> Waiting:
        return Waiting(lambda: self._load(name))

    def _load(self, name: str) -> Any:
        if self._module == self._owner:  # a module below: asking the package would ask us again
            return importlib.import_module(f"{self._module}.{name}")
        module = self._real(self._module, None, None, (name,), 0)
        try:
            return getattr(module, name)
        except AttributeError as error:
            raise ImportError(f"cannot import name {name!r} from {self._module!r}", name=self._module) from error


class LazyBuiltins(dict[str, Any]):
    """The builtins of a lazy importer; `waits` holds the names that its own functions may still ask for."""

    def __init__(self, base: Mapping[str, Any], module: ModuleType) -> None:
        super().__init__(base)
        self.waits: dict[str, Waiting] = {}
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self.load(name)

    def load(self, name: str) -> Any:
        """Bind a waiting name in the module. Raises KeyError for any other."""
        value = self.waits[name].resolve()
        vars(self._module)[name] = value  # as the statement would have, whatever the import itself has bound there
        return value


class _Entry(NamedTuple):
    defers: tuple[str, ...]

    def has(self, module: str) -> bool:
        return any(f"{module}.".startswith(f"{name}.") for name in self.defers)

    def leads_through(self, module: str) -> bool:
        """Whether an import that may wait binds this module in passing."""
        return self.has(module) or any(name.startswith(f"{module}.") for name in self.defers)


class Lazy:
    """The table: importers by name, and what waits in each."""

    def __init__(self, table: Iterable[Mapping[str, Any]]) -> None:
        """`table` holds the [[lazy]] entries: `importer`, a full name, and `defers`, modules with all below."""
        self._entries = {entry["importer"]: _Entry(tuple(entry["defers"])) for entry in table}

    def __contains__(self, importer: str) -> bool:
        return importer in self._entries

    def builtins_for(self, module: ModuleType, base: Mapping[str, Any]) -> LazyBuiltins:
        """The builtins that a listed importer is executed with; `base` are those that it would have."""
        given = LazyBuiltins(base, module)
        given["__import__"] = self._import_for(module, base["__import__"])
        return given

    def settle(self, module: ModuleType) -> None:
        """After its execution: names that wait are unbound, and loaded by who asks for them."""
        given = vars(module).get("__builtins__")
        if not isinstance(given, LazyBuiltins):
            return
        given["__import__"] = given["__import__"].__wrapped__  # statements in its functions are not put off
        given.waits.update({name: value for name, value in vars(module).items() if isinstance(value, Waiting)})
        for name in given.waits:
            del vars(module)[name]
        _answer_for(module, given, self._entries[module.__name__])

    def _import_for(self, module: ModuleType, real: ImportFunction) -> ImportFunction:
        owner, entry = module.__name__, self._entries[module.__name__]

        def __import__(  # noqa: A001, N807 - its name shows in tracebacks and is what it stands in for
            name: str,
            globals: Mapping[str, Any] | None = None,  # noqa: A002
            locals: Mapping[str, Any] | None = None,  # noqa: A002
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> Any:
            full = importlib.util.resolve_name("." * level + name, module.__package__ or "") if level else name
            if "*" not in (fromlist or ()):
                asked = [f"{owner}.{item}" for item in fromlist or ()] if full == owner else [full]
                plain = bool(fromlist) or "." not in full  # `import a.b` binds a, which may have other parts
                # `from a.b import b` in a: who imports a.b himself would find the module there
                plain = plain and full.removeprefix(f"{owner}.").partition(".")[0] not in (fromlist or ())
                if plain and all(entry.has(one) and _is_there(one) for one in asked):
                    if fromlist:
                        return _Source(owner, full, real)
                    return Waiting(lambda: real(full, None, None, (), 0))
            return real(name, globals, locals, fromlist, level)

        __import__.__wrapped__ = real  # type: ignore[attr-defined]
        return __import__


def _is_there(module: str) -> bool:
    """Whether the module can be found; unlike importlib.util.find_spec, this imports no package above it."""
    top, _, below = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # loaded, and without a spec
        return False
    for part in below.split(".") if below else ():
        if spec is None or spec.submodule_search_locations is None:
            return False
        top = f"{top}.{part}"
        spec = PathFinder.find_spec(top, list(spec.submodule_search_locations))
    return spec is not None


def _answer_for(module: ModuleType, given: LazyBuiltins, entry: _Entry) -> None:
    """Give the module PEP 562's functions. A name that waits comes first: it would be bound; then those of its own."""
    before, listed = vars(module).get("__getattr__"), vars(module).get("__dir__")

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name in given.waits:
            return given.load(name)
        error = AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        if before is not None:
            try:
                return before(name)
            except AttributeError as own:
                error = own
        if name == "__all__":  # asked for by `from module import *`, which else takes what is bound
            return [one for one in {**vars(module), **given.waits} if not one.startswith("_")]
        below = f"{module.__name__}.{name}"
        if entry.leads_through(below) and _is_there(below):
            return importlib.import_module(below)
        raise error

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*(listed() if listed is not None else vars(module)), *given.waits})

    vars(module).update(__getattr__=__getattr__, __dir__=__dir__)


def plain_builtins() -> dict[str, Any]:
    """Python's own builtins, for an importer in no view's scope; imports go through what is in force when asked."""

    def __import__(*args: Any, **named: Any) -> Any:  # noqa: A001, N807
        return builtins.__import__(*args, **named)

    return {**vars(builtins), "__import__": __import__}
