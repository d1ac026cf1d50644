"""context/io.json of NeMo 2.0: Fiddle's graph of the objects that NeMo rebuilds a model from.

Room checkpoint/ (leaf). Here such a graph is a tree as context/model.yaml has it: `_target_` names the class of a
dict's values, and `_call_: false` makes the name itself the value. Names are text both ways: nothing is imported.
May import this room. Proof: tests/checkpoint/test_nemo_context.py.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from nxdt_nemo.errors import UserError, one_line

__all__ = ["read", "write"]

_FIDDLE = "fiddle._src.config"
_METADATA = f"{_FIDDLE}.BuildableTraverserMetadata"
_KEY = re.compile(r"Key\(key=(.*)\)", re.DOTALL)
_DEPTH = 64  # of a graph; upstream's have seven


def write(tree: Mapping[str, Any]) -> bytes:
    """The file of a tree, whose root is a TrainerContext."""
    graph = _Graph()
    root = graph.node(tree, "<root>")
    whole = {"root": root, "objects": graph.objects, "refcounts": dict.fromkeys(graph.objects, 1), "version": "0.0.1"}
    return json.dumps(whole).encode()


class _Graph:
    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def node(self, value: Any, path: str) -> Any:
        """What stands for a value: a leaf, a name, or a reference to one of the objects."""
        if isinstance(value, Mapping) and value.get("_call_") is False:
            return _name(value["_target_"])
        if isinstance(value, Mapping) and "_target_" in value:
            return self._config(value, path)
        if isinstance(value, Mapping):
            items = [[f"Key(key={key!r})", self.node(inner, f"{path}[{key!r}]")] for key, inner in value.items()]
            return self._refer("dict", _name("builtins.dict"), items, _tuple(value), path)
        if isinstance(value, (list, tuple)):
            items = [[f"Index(index={at})", self.node(inner, f"{path}[{at}]")] for at, inner in enumerate(value)]
            return self._refer("list", _name("builtins.list"), items, None, path)
        return {"type": "leaf", "value": value, "paths": [path]}

    def _config(self, value: Mapping[str, Any], path: str) -> Any:
        given = {key: inner for key, inner in value.items() if key != "_target_"}
        described = [
            ["Attr(name='fn_or_cls')", _name(value["_target_"])],
            ["Attr(name='argument_names')", _tuple(given)],
            ["Attr(name='argument_tags')", _object(_name("builtins.dict"), [], _tuple(()))],
            ["Attr(name='argument_history')", _object(_name("builtins.dict"), [], _tuple(()))],
        ]
        items = [[f"Attr(name='{key}')", self.node(inner, f"{path}.{key}")] for key, inner in given.items()]
        metadata = _object(_name(_METADATA), described, _name(_METADATA))
        return self._refer(value["_target_"].rpartition(".")[2], _name(f"{_FIDDLE}.Config"), items, metadata, path)

    def _refer(self, called: str, kind: Any, items: list[Any], metadata: Any, path: str) -> Any:
        key = f"{called}_{len(self.objects) + 1}"
        self.objects[key] = {**_object(kind, items, metadata), "paths": [path]}
        return {"type": "ref", "key": key}


def _object(kind: Any, items: list[Any], metadata: Any) -> dict[str, Any]:
    return {"type": kind, "items": items, "metadata": metadata}


def _tuple(words: Any) -> dict[str, Any]:
    items = [[f"Index(index={at})", word] for at, word in enumerate(words)]
    return _object(_name("builtins.tuple"), items, None)


def _name(dotted: str) -> dict[str, Any]:
    module, _, name = dotted.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}


def read(data: bytes, place: str) -> dict[str, Any]:
    """The tree of a file. Raises UserError if it is no such graph."""
    try:
        whole = json.loads(data)
        found = _Tree(whole["objects"]).value(whole["root"], 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SyntaxError) as error:
        raise UserError(f"is no graph of Fiddle's: {one_line(error)}", place=place, fix="copy it again") from error
    if not isinstance(found, dict):
        raise UserError("describes no object", place=place, fix="copy it again")
    return found


class _Tree:
    def __init__(self, objects: dict[str, Any]) -> None:
        self._objects, self._made = objects, dict[str, Any]()

    def value(self, node: Any, depth: int) -> Any:
        """A node's value. Objects that several refer to are made once; a cycle is too deep."""
        if depth > _DEPTH:
            raise ValueError(f"deeper than {_DEPTH} objects, or a cycle")
        if not isinstance(node, dict):
            return node
        kind = node["type"]
        if kind == "leaf":
            return node["value"]
        if kind == "pyref":
            return {"_target_": f"{node['module']}.{node['name']}", "_call_": False}
        if kind == "ref":
            if node["key"] not in self._made:
                self._made[node["key"]] = self.value(self._objects[node["key"]], depth + 1)
            return self._made[node["key"]]
        return self._object(f"{kind['module']}.{kind['name']}", node, depth)

    def _object(self, kind: str, node: dict[str, Any], depth: int) -> Any:
        items = [(str(name), self.value(inner, depth + 1)) for name, inner in node["items"]]
        if kind in ("builtins.list", "builtins.tuple"):
            return [value for _, value in items]
        if kind == "builtins.dict":
            return {_plain(name): value for name, value in items}
        given = {name.removeprefix("Attr(name='").removesuffix("')"): value for name, value in items}
        if kind == _METADATA:
            return given
        if not kind.startswith(f"{_FIDDLE}."):  # an object that was pickled beside: its class says enough
            return {"_target_": kind}
        described = self.value(node["metadata"], depth + 1)
        return {"_target_": described["fn_or_cls"]["_target_"], **given}


def _plain(name: str) -> str:
    found = _KEY.fullmatch(name)
    return str(ast.literal_eval(found[1])) if found else name
