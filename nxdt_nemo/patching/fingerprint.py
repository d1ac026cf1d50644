"""Where upstream's source is and what it hashes to; found without importing anything.

Room patching/ (leaf). May import nxdt_nemo.errors. Proof: tests/patching/test_fingerprint.py.

A fingerprint is the sha256 of the target's own statements, printed back from the syntax tree without
docstrings, so that comments and layout may change and code may not. A name that is defined under
conditions (if, try) has several definitions, and all of them count, in source order.
The printed form belongs to the Python minor version, and pyproject.toml allows one.
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from nxdt_nemo.errors import PatchError

__all__ = ["Place", "Source", "locate", "source_of"]

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Place:
    """A dotted name split at its module.

    module     the longest part that is a module on disk
    attribute  the rest; () if the name is a module
    file       the module's .py file; None for a C extension or a namespace package
    package    the module has submodules, so the rest may also be a module that is absent
    """

    module: str
    attribute: tuple[str, ...]
    file: Path | None
    package: bool


def locate(target: str, roots: Sequence[str] | None = None) -> Place | None:
    """Split target at its module by looking at files, in sys.path or in roots; None if even the top is absent."""
    first, *rest = target.split(".")
    spec = _top(first, roots)
    if spec is None:
        return None
    name = first
    while rest and spec.submodule_search_locations is not None:
        below = PathFinder.find_spec(f"{name}.{rest[0]}", list(spec.submodule_search_locations))
        if below is None:
            break
        spec, name = below, f"{name}.{rest.pop(0)}"
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    return Place(name, tuple(rest), file, spec.submodule_search_locations is not None)


def _top(name: str, roots: Sequence[str] | None) -> ModuleSpec | None:
    if roots is not None:
        return PathFinder.find_spec(name, list(roots))
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # imported already, and without a spec
        return None


def source_of(module: ModuleType) -> Source:
    """The source of the file that this module was really imported from."""
    origin = getattr(module.__spec__, "origin", None)
    if not origin or not origin.endswith(".py"):
        raise PatchError(f"{module.__name__} was imported from {origin}, which is not Python source")
    return Source(Path(origin))


class Source:
    """One parsed source file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.text = file.read_bytes()
        self._tree = _parse(self.text, file)

    def definitions(
        self, attribute: Sequence[str], *, imported: bool = False, conditional: bool = True
    ) -> list[ast.stmt]:
        """The statements that bind the name here, in source order; [] if none does.

        Looks into if, try, with and loops, unless conditional is False, and not into functions. A name that is
        only imported is somebody else's, unless imported is set. For () the whole file.
        """
        if not attribute:
            return list(self._tree.body)
        bodies: list[list[ast.stmt]] = [self._tree.body]
        for part in attribute[:-1]:
            bodies = [node.body for body in bodies for node in _binding(body, part) if isinstance(node, ast.ClassDef)]
        found = [node for body in bodies for node in _binding(body, attribute[-1]) if conditional or node in body]
        only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in found)
        return [] if only_imports and not imported else found

    def fingerprint(self, attribute: Sequence[str]) -> str:
        """`sha256:` and the digest of the definitions; PatchError if there are none."""
        found = self.definitions(attribute)
        if not found:
            elsewhere = self.definitions(attribute, imported=True)
            hint = ", only imported; name the module that defines it" if elsewhere else ""
            raise PatchError(f"{'.'.join(attribute)} is not defined in {self.file}{hint}")
        code = "\n".join(ast.unparse(_without_texts(node)) for node in found if not _is_text(node))
        return "sha256:" + hashlib.sha256(code.encode()).hexdigest()

    def lines(self, attribute: Sequence[str]) -> list[tuple[int, int]]:
        """First and last line of each definition, decorators included."""
        return [(_first_line(node), node.end_lineno or node.lineno) for node in self.definitions(attribute)]


def _parse(text: bytes, file: Path) -> ast.Module:
    """ast.parse with the garbage collector paused: a tree's many nodes set off full collections, which
    double the time once torch is loaded."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text, filename=str(file))
    except SyntaxError as error:
        raise PatchError(f"{file}:{error.lineno}: {error.msg}") from error
    finally:
        if collecting:
            gc.enable()


def _binding(body: Sequence[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """The statements of body, nested blocks included, that bind name."""
    for node in body:
        if isinstance(node, _Definition):
            if node.name == name:
                yield node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name.partition(".")[0]) == name for alias in node.names):
                yield node
        elif name in _assigned(node):
            yield node
        else:
            for block in _blocks(node):
                yield from _binding(block, name)


def _assigned(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        return set()
    leaves = (leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name))
    return {leaf.id for leaf in leaves if isinstance(leaf.ctx, ast.Store)}  # in `a.b = 1`, a is read


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists directly inside a compound statement, in source order."""
    for field in ("body", "handlers", "cases", "orelse", "finalbody"):
        children = getattr(node, field, [])
        if field in ("handlers", "cases"):
            yield from (child.body for child in children)
        else:
            yield children


def _without_texts(node: ast.stmt) -> ast.stmt:
    """The node without docstrings and other bare texts, which do nothing. Changes it in place; twice is once."""
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list):
            inner.body = [child for child in body if not _is_text(child)] or [ast.Pass()]  # type: ignore[attr-defined]
    return node


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, _Definition) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])
