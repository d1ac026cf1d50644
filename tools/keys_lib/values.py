"""What kind of value a key takes and what it is when nobody writes it, read from upstream's syntax trees.

Kinds are YAML's: bool, int, float, str, list, dict; "any" where upstream does not say.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    **{name: name for name in ("bool", "int", "float", "str", "list", "dict")},
    **dict.fromkeys(("List", "Tuple", "tuple", "Sequence", "Iterable", "set", "Set"), "list"),
    **dict.fromkeys(("Dict", "Mapping", "DictConfig"), "dict"),
    **dict.fromkeys(("Path", "_PATH", "LiteralString"), "str"),
}
UNKNOWN = object()  # no default that the syntax tree shows


@dataclass
class Value:
    """What was found about one key.

    models    kinds of model whose configs write it: gpt, bert, t5, tuning
    defaults  what it is when it is not written, by source
    """

    kinds: set[str] = field(default_factory=set)
    choices: set[str] = field(default_factory=set)
    models: Counter[str] = field(default_factory=Counter)
    defaults: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, source: str, default: Any) -> None:
        """A default as one source has it; text, since it goes to JSON and may be a list."""
        if default is not UNKNOWN:
            self.defaults.setdefault(source, Counter())[repr(default)] += 1

    @property
    def default(self) -> Any:
        """NeMo's own reading first, then a constructor's or a dataclass's; UNKNOWN if nobody has one."""
        for source in ("get", "field", "argument"):
            if source in self.defaults:
                return ast.literal_eval(self.defaults[source].most_common(1)[0][0])
        return UNKNOWN


Found = defaultdict[tuple[str, str], Value]


def kind_of(value: Any) -> str:
    """A Python value's kind; "" for None."""
    return "" if value is None else type(value).__name__ if type(value).__name__ in KINDS else "any"


def literal(node: ast.AST | None) -> Any:
    """A default in the source, a dataclass field's too; UNKNOWN when it is computed."""
    match node:
        case ast.Call(func=ast.Name(id="field") | ast.Attribute(attr="field"), keywords=words):
            named = {word.arg: word.value for word in words}
            if "default_factory" in named:
                made = ast.unparse(named["default_factory"]).removeprefix("lambda: ")
                return {"list": [], "dict": {}}.get(made, UNKNOWN)
            return literal(named.get("default"))
        case None:
            return UNKNOWN
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return UNKNOWN
    return list(value) if isinstance(value, tuple) else value


def annotated(node: ast.AST | None, into: Value) -> None:
    """Add the kinds of a type annotation."""
    match node:
        case None | ast.Constant(value=None):
            pass
        case ast.Constant(value=str(text)):
            annotated(ast.parse(text, mode="eval").body, into)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            into.kinds.add(KINDS.get(name, "any"))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            annotated(left, into)
            annotated(right, into)
        case ast.Subscript(
            value=ast.Name(id="Optional" | "Union") | ast.Attribute(attr="Optional" | "Union"), slice=inner
        ):
            for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                annotated(part, into)
        case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal"), slice=inner):
            for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                value = literal(part)
                if value is not None and value is not UNKNOWN:
                    into.kinds.add(kind_of(value))
                    into.choices.add(str(value))
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            into.kinds.add(KINDS.get(name, "any"))
        case _:
            into.kinds.add("any")


def of_fields(node: ast.ClassDef) -> Iterator[tuple[str, Value]]:
    """A dataclass's fields."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = Value()
            annotated(statement.annotation, value)
            value.add("field", literal(statement.value))
            yield statement.target.id, value


def of_arguments(node: ast.ClassDef) -> Iterator[tuple[str, Value]]:
    """A constructor's arguments."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            given = statement.args
            plain = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
            for argument, default in [
                *zip(given.args, plain, strict=True),
                *zip(given.kwonlyargs, given.kw_defaults, strict=True),
            ]:
                value = Value()
                known = literal(default)
                if argument.annotation is None and known is not UNKNOWN and known is not None:
                    value.kinds.add(kind_of(known))
                else:
                    annotated(argument.annotation, value)
                value.add("argument", known)
                yield argument.arg, value


def merge(into: Value, other: Value) -> None:
    """Add what another source says."""
    into.kinds |= other.kinds
    into.choices |= other.choices
    into.models.update(other.models)
    for source, counted in other.defaults.items():
        into.defaults.setdefault(source, Counter()).update(counted)


def model_of(config: dict[str, Any]) -> str:
    """The kind of model that a whole config is for; "" for others than these."""
    model = config.get("model") or {}
    if "train_ds" in (model.get("data") or {}):
        return "" if "encoder" in model else "tuning"
    if "encoder" in model and "decoder" in model:
        return "t5"
    if "mcore_bert" in model:
        return "bert"
    return "gpt" if model.get("mcore_gpt") and "retro" not in model and "data" in model else ""


def of_stock(node: object, section: str, found: Found, model: str = "", weight: int = 1) -> None:
    """The kinds of the values that a parsed YAML has; an interpolation says nothing. weight: how usual a key is."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str) or key in ("hydra", "defaults"):
                continue
            if not (isinstance(value, str) and ("${" in value or value == "???")):
                found[section, key].kinds |= {kind_of(value)} - {""}
            if model:
                found[section, key].models[model] += weight
            of_stock(value, f"{section}.{key}" if section else key, found, model, weight)
    elif isinstance(node, list):
        for value in node:
            of_stock(value, section, found)


def dumped(found: Found, known: dict[str, list[str]], yamls: Counter[str]) -> dict[str, dict[str, Any]]:
    """Section -> name -> {kinds, default, choices, in, common} of the known keys; what is not found is left out.

    in      kinds of model whose configs write the key
    common  those of which a third of the `yamls` do
    """
    made: dict[str, dict[str, Any]] = {}
    for (section, name), value in sorted(found.items()):
        if name not in known.get(section, ()):
            continue
        entry: dict[str, Any] = {}
        kinds = value.kinds - {""}
        if kinds and "any" not in kinds:
            entry["kinds"] = sorted(kinds)
        if value.default is not UNKNOWN:
            entry["default"] = value.default
        if value.choices and kinds == {"str"}:
            entry["choices"] = sorted(value.choices)
        if value.models:
            entry["in"] = sorted(value.models)
            entry["common"] = sorted(m for m, count in value.models.items() if count >= yamls[m] / 3)
        if entry:
            made.setdefault(section, {})[name] = entry
    return made
