"""Checks a live upstream module against its records, installs the replacements, and takes them back.

Room patching/ (leaf). May import nxdt_nemo.errors, nxdt_nemo.console and this room's files.
Whoever imports modules calls apply_to(module) right after a module was executed, before its importers
can bind names from it. Proof: tests/patching/test_patcher.py, test_rebind.py.

A wrapper is `f(original, /, *args, **kwargs)`. It gets the arguments of the call as upstream wrote it, self or
cls first for methods and classmethods, and calls original(*args, **kwargs). For a property it wraps the getter.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from nxdt_nemo import console
from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.fingerprint import Source, source_of
from nxdt_nemo.patching.records import Record, check_versions
from nxdt_nemo.patching.stubs import StubModule, stub_symbol

__all__ = ["SCOPE", "Applied", "Patcher", "load_object"]

# Only these may hold upstream's objects under our control; other libraries' globals are never written.
# Where an upstream that has records may hold a by-value binding of a target; other libraries are never touched.
SCOPE = frozenset({"hydra", "lightning", "megatron", "nemo", "pytorch_lightning", "__main__", "__mp_main__"})

_ABSENT: Any = object()
_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None))  # identity says nothing


@dataclasses.dataclass(frozen=True)
class Applied:
    """A record in force: where upstream's source is and which by-value bindings were rebound."""

    record: Record
    file: str
    rebound: tuple[str, ...]


@dataclasses.dataclass
class _Site:
    """One attribute of a module or class, and what stood and stands there."""

    owner: ModuleType | type
    name: str
    records: list[Record]
    file: str
    original: Any
    installed: Any
    bindings: list[tuple[ModuleType, str]] = dataclasses.field(default_factory=list)

    @property
    def current(self) -> Any:
        return vars(self.owner).get(self.name, _ABSENT)

    def follows(self, name: str) -> bool:
        """Whether a global of this name that holds the original was taken from here.

        Any name, if the object was made here; only the same name, if here is an alias for somebody else's
        object (`jit_fuser = torch.compile`); none, if it is a plain value like False.
        """
        if not isinstance(self.owner, ModuleType) or isinstance(self.original, _PLAIN):
            return False
        made_here = getattr(self.original, "__module__", None) == self.owner.__name__
        return name == self.name or (made_here and hasattr(self.original, "__qualname__"))


class Patcher:
    """Applies records to modules as they come, and undoes them.

    Order: apply_to(module) for each module as it is imported, or `with patcher:` to begin with those that
    are imported already; undo() at the end. All may be repeated. The first PatchError is raised again by
    every later apply_to until undo(), so that upstream code that swallows it gets no further.
    """

    def __init__(
        self, records: Sequence[Record], lane_name: Callable[[], str], *, scope: frozenset[str] = SCOPE
    ) -> None:
        self._records, self._lane_name, self._scope = list(records), lane_name, scope
        self._sites: list[_Site] = []
        self._stubs: dict[str, StubModule] = {}
        self._failure: PatchError | None = None
        self._depth = 0

    def modules(self) -> set[str]:
        """The names to call apply_to or stub_for for: each dotted prefix of a target, and a stub's target.

        Which prefix is the target's module shows when it is imported. A package on the way costs a look
        at a folder, and notices that the module below it is gone.
        """
        stubs = {record.target for record in self._records if record.kind == "stub"}
        parts = [record.target.split(".") for record in self._records]
        return stubs | {".".join(names[:end]) for names in parts for end in range(1, len(names))}

    def apply_to(self, module: ModuleType) -> None:
        """Check all records of this module, then install them; nothing is installed if one check fails."""
        if self._failure is not None:
            raise self._failure
        if isinstance(module, StubModule):
            return
        try:
            self._install(self._plan(module))
        except PatchError as error:
            self._failure = error
            raise

    def stub_for(self, fullname: str) -> ModuleType | None:
        """The stub that stands for this module, if a stub record names it or a package above it."""
        for record in self._records:
            if record.kind == "stub" and f"{fullname}.".startswith(f"{record.target}.") and self._in_lane(record):
                check_versions(record, _installed_version)
                return self._stubs.setdefault(fullname, StubModule(fullname, record.why))
        return None

    def applied(self) -> list[Applied]:
        """What is in force, in the order in which it was installed."""
        return [
            Applied(record, site.file, tuple(f"{module.__name__}.{name}" for module, name in site.bindings))
            for site in self._sites
            for record in site.records
        ]

    def undo(self) -> None:
        """Put upstream's own objects back, wherever they were taken away. Classes derived from ours stay."""
        sites, self._sites, self._failure = self._sites, [], None
        for site in sites:  # in this order: of a module that was reloaded, the last original stays
            _put(site.owner, site.name, site.original)
            for module, name in site.bindings:
                if vars(module).get(name) is site.installed:
                    vars(module)[name] = site.original
        self._return_late_bindings(sites)
        for name, stub in self._stubs.items():
            _forget_module(name, stub)
        self._stubs.clear()

    def __enter__(self) -> Patcher:
        self._depth += 1
        try:
            for name in sorted(self.modules() & set(sys.modules)):
                self.apply_to(sys.modules[name])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()

    def _plan(self, module: ModuleType) -> list[_Site]:
        """What to install in this module. All that can fail fails here, save an attribute that cannot be set."""
        groups: dict[str, list[Record]] = {}
        for record in self._records:
            if _owns(module, record) and self._in_lane(record):
                groups.setdefault(record.target, []).append(record)
        source = functools.cache(lambda: source_of(module))
        checked = [self._check(module, sorted(group, key=_order), source) for group in groups.values()]
        sites = [site for site in checked if site is not None]
        for site in sites:
            for record in site.records:
                site.installed = _build(record, site.installed)
        return sites

    def _check(self, module: ModuleType, records: list[Record], source: Callable[[], Source]) -> _Site | None:
        """The site of these records, which share a target; None if they are in force.

        Raises PatchError if a version, the target's presence or its source is not as recorded.
        """
        attribute = records[0].target.removeprefix(module.__name__ + ".").split(".")
        owner, original = _find(module, attribute)
        if any(s.owner is owner and s.name == attribute[-1] and s.installed is original for s in self._sites):
            return None
        for record in records:
            check_versions(record, _installed_version)
        if owner is None:
            raise PatchError(f"{records[0].place}: {module.__name__} has no class or module {'.'.join(attribute[:-1])}")
        _check_presence(records[0], module, owner, original)
        for record in records:
            if record.fingerprint:
                _check_fingerprint(record, attribute, source())
        return _Site(owner, attribute[-1], records, _file(module), original, original)

    def _in_lane(self, record: Record) -> bool:
        return self._lane_name() in record.lanes

    def _install(self, sites: list[_Site]) -> None:
        done: list[_Site] = []
        for site in sites:
            try:
                _put(site.owner, site.name, site.installed)
            except (AttributeError, TypeError) as error:  # a C type, an enum: cannot be written
                for earlier in reversed(done):
                    _put(earlier.owner, earlier.name, earlier.original)
                raise PatchError(f"{site.records[0].place}: {site.records[0].target} cannot be set: {error}") from error
            done.append(site)
        self._sites += sites
        self._rebind(sites)

    def _rebind(self, sites: list[_Site]) -> None:
        """Give the new object to those who had taken upstream's before it was replaced."""
        by_id: dict[int, list[_Site]] = {}
        for site in sites:
            if site.original is not _ABSENT:
                by_id.setdefault(id(site.original), []).append(site)
        for module, name, value in self._globals(set(by_id)):
            followed = [site for site in by_id[id(value)] if site.follows(name)]
            if followed:
                site = min(followed, key=lambda site: site.name != name)  # the one of the same name first
                vars(module)[name] = site.installed
                site.bindings.append((module, name))

    def _return_late_bindings(self, sites: list[_Site]) -> None:
        """Give upstream's object to those who took ours from a patched module."""
        by_id: dict[int, dict[tuple[int, str], _Site]] = {}
        for site in sites:
            known = isinstance(site.owner, ModuleType) and site.original is not _ABSENT
            if known and not isinstance(site.installed, _PLAIN):
                by_id.setdefault(id(site.installed), {})[id(site.owner), site.name] = site
        for module, name, value in self._globals(set(by_id)):
            candidates = list(by_id[id(value)].values())
            if len(candidates) > 1:  # one object stands in for several of upstream's: the name decides
                candidates = [site for site in candidates if site.name == name]
            if len(candidates) == 1:
                vars(module)[name] = candidates[0].original
            else:
                console.warn(f"undo: {module.__name__}.{name} keeps our object; several upstream names share it")

    def _globals(self, ids: set[int]) -> Iterator[tuple[ModuleType, str, Any]]:
        """The globals in scope that hold one of these objects."""
        if not ids:
            return
        for key in list(sys.modules):  # keys only: thousands of new pairs would set the garbage collector off
            module = sys.modules.get(key)
            if key.partition(".")[0] not in self._scope or not isinstance(module, ModuleType):
                continue
            if not ids.isdisjoint(map(id, vars(module).values())):  # nearly always ends here, and quickly
                held = [(name, value) for name, value in list(vars(module).items()) if id(value) in ids]
                yield from ((module, name, value) for name, value in held)


def load_object(reference: str) -> Any:
    """Import `module:attribute.path`, or a whole module; a class's own descriptor comes as it is.

    Raises PatchError if the attribute is missing; an ImportError is let through.
    """
    module, _, attribute = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in attribute.split(".") if attribute else ():
        try:
            found = inspect.getattr_static(found, name)
        except AttributeError as error:
            raise PatchError(f"{reference}: no {name} there") from error
    return found


def _order(record: Record) -> int:
    return record.order or 0


def _file(module: ModuleType) -> str:
    return getattr(module.__spec__, "origin", None) or ""


def _owns(module: ModuleType, record: Record) -> bool:
    """Whether module is where the record's target lives, not a package above its module."""
    if not record.target.startswith(f"{module.__name__}."):
        return False
    rest = record.target.removeprefix(f"{module.__name__}.").split(".")
    if not hasattr(module, "__path__"):
        return True
    if _is_module_below(module, rest[0]):
        return record.kind == "define" and len(rest) == 1  # it exists after all: _check_presence says so
    # An absent name in a package may be a module: `from package import name` asks for it, see stub_for.
    return record.kind != "stub" or (len(rest) == 1 and rest[0] in vars(module))


def _is_module_below(package: ModuleType, name: str) -> bool:
    below = f"{package.__name__}.{name}"
    return below in sys.modules or PathFinder.find_spec(below, list(package.__path__)) is not None


def _find(module: ModuleType, attribute: list[str]) -> tuple[ModuleType | type | None, Any]:
    """The module or class that the attribute's path leads to, and what its own __dict__ holds there."""
    owner: ModuleType | type = module
    for name in attribute[:-1]:
        inner = vars(owner).get(name)
        if not isinstance(inner, type):
            return None, _ABSENT
        owner = inner
    return owner, vars(owner).get(attribute[-1], _ABSENT)


def _check_presence(record: Record, module: ModuleType, owner: ModuleType | type, value: Any) -> None:
    """Raise unless the target is there (replace, wrap) or is not there (define)."""
    name = record.target.rpartition(".")[2]
    if record.kind == "define":
        if hasattr(owner, name) or (hasattr(owner, "__path__") and _is_module_below(module, name)):
            raise PatchError(f"{record.place}: {record.target} exists upstream now; it was to be defined")
    elif value is _ABSENT and record.kind != "stub":
        for base in owner.__mro__[1:] if isinstance(owner, type) else ():
            if name in vars(base):
                home = f"{base.__module__}.{base.__qualname__}.{name}"
                raise PatchError(f"{record.place}: {record.target} is inherited; name the defining class: {home}")
        raise PatchError(f"{record.place}: {record.target} is gone; upstream moved or renamed it")


def _check_fingerprint(record: Record, attribute: list[str], source: Source) -> None:
    try:
        found = source.fingerprint(attribute)
    except PatchError as error:
        raise PatchError(f"{record.place}: {error}") from error
    if found != record.fingerprint:
        raise PatchError(
            f"{record.place}: the source of {record.target} changed ({source.file}:{source.lines(attribute)[0][0]}): "
            f"{record.fingerprint[:19]}... is recorded, {found[:19]}... was imported; read the change, "
            f"then nxdt-nemo patches fingerprint {record.target}"
        )


@functools.cache
def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build(record: Record, original: Any) -> Any:
    """What takes the place of original."""
    if record.kind == "stub":
        return stub_symbol(record.target, record.why)
    try:
        replacement = load_object(record.replacement)
    except (ImportError, PatchError) as error:
        raise PatchError(f"{record.place}: the replacement does not load: {error}") from error
    if record.kind == "define":
        return replacement
    if record.kind == "wrap":
        return _wrap(record, original, replacement)
    return _fit(record, original, replacement)


def _fit(record: Record, original: Any, replacement: Any) -> Any:
    """The replacement as the same sort of class attribute that the original was."""
    for sort in (staticmethod, classmethod):
        if isinstance(original, sort):
            return replacement if isinstance(replacement, sort) else sort(replacement)
    if isinstance(original, property):
        if isinstance(replacement, property):
            return replacement
        return property(replacement, original.fset, original.fdel, original.__doc__)
    is_descriptor = hasattr(type(original), "__get__") and not callable(original)  # a cached_property and its like
    if is_descriptor and type(replacement) is not type(original):
        raise PatchError(f"{record.place}: {record.target} is a {type(original).__name__}; replace it by one")
    return replacement


def _wrap(record: Record, original: Any, wrapper: Callable[..., Any]) -> Any:
    if isinstance(original, staticmethod | classmethod):
        return type(original)(_wrapped(original.__func__, wrapper))
    if isinstance(original, property) and original.fget is not None:
        return property(_wrapped(original.fget, wrapper), original.fset, original.fdel, original.__doc__)
    if isinstance(original, type):
        raise PatchError(f"{record.place}: {record.target} is a class; wrap its __init__ or replace it")
    if not callable(original):
        raise PatchError(f"{record.place}: {record.target} is a {type(original).__name__} and cannot be wrapped")
    return _wrapped(original, wrapper)


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patched.__nxdt_wrapper__ = wrapper  # type: ignore[attr-defined]  # how verify knows it again
    return patched


def _put(owner: ModuleType | type, name: str, value: Any) -> None:
    if value is not _ABSENT:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


def _forget_module(name: str, module: ModuleType) -> None:
    """Take a stub out of sys.modules and off its parent, unless something else took its place."""
    if sys.modules.get(name) is module:
        del sys.modules[name]
    parent, _, short = name.rpartition(".")
    if parent in sys.modules and vars(sys.modules[parent]).get(short) is module:
        delattr(sys.modules[parent], short)
