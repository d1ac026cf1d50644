"""The records against what is installed: statically, and live in a process of its own.

Room patching/ (leaf). May import nxdt_nemo.errors and this room's files. Proof: tests/patching/test_verify.py,
and test_records.py over the repository's own records.

static  imports nothing: versions, target, fingerprint, and that the replacement is written somewhere.
        `against` names another site-packages folder, to see what the next upstream release would break.
live    starts Python, activates, imports each target's module as training does, and looks at what stands there:
        the replacement itself, and one that takes every call that upstream's parameters allow.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.fingerprint import Place, Source, locate
from nxdt_nemo.patching.patcher import load_object
from nxdt_nemo.patching.records import Record, check_versions
from nxdt_nemo.patching.stubs import StubModule, StubType

__all__ = ["ACTIVATE", "Finding", "Row", "find", "fingerprint", "incompatibility", "live", "static", "verify"]

ACTIVATE = "import nxdt_nemo; nxdt_nemo.activate()"
_LANE = "cpu"  # the lane that every machine has
_TIMEOUT = 600

# A parameter as (name, kind as in inspect.Parameter, whether it has a default).
_Parameter = tuple[str, str, bool]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check; ok is None if it was not made, and why says the reason."""

    ok: bool | None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One record and its findings."""

    id: str
    target: str
    kind: str
    static: Finding
    live: Finding

    @property
    def ok(self) -> bool:
        """False on drift; a check that was not made is no drift."""
        return self.static.ok is not False and self.live.ok is not False


def verify(
    records: Sequence[Record], *, against: Path | None = None, with_live: bool = True, activate: str = ACTIVATE
) -> list[Row]:
    """A row for each record. The live stage needs what is installed: against another folder, static only."""
    if with_live and against is None:
        lives = live(records, activate=activate)
    else:
        lives = {record.id: Finding(None, "static only") for record in records}
    return [Row(r.id, r.target, r.kind, static(r, against=against), lives[r.id]) for r in records]


def fingerprint(target: str, *, against: Path | None = None) -> tuple[str, Place]:
    """What to put in a record of this target, and where its source is. Raises PatchError if there is none."""
    place = find(target, against)
    return Source(_file(place)).fingerprint(place.attribute), place


def find(target: str, against: Path | None = None) -> Place:
    """The target's place upstream; PatchError if not even its top package is installed."""
    place = locate(target, None if against is None else [str(against)])
    if place is None:
        raise PatchError(f"{target}: no package {target.partition('.')[0]} in {against or 'this environment'}")
    return place


def static(record: Record, *, against: Path | None = None) -> Finding:
    """Everything that can be checked without importing upstream or the replacement."""
    try:
        check_versions(record, functools.partial(_version, against))
        _check_target(record, against)
        _check_replacement(record)
    except PatchError as error:
        return Finding(False, str(error).removeprefix(f"{record.place}: "))
    return Finding(True)


def _version(against: Path | None, distribution: str) -> str | None:
    path = sys.path if against is None else [str(against)]
    found = next(iter(importlib.metadata.distributions(name=distribution, path=path)), None)
    return None if found is None else found.version


def _check_target(record: Record, against: Path | None) -> None:
    if record.kind == "stub" and not record.fingerprint:
        return
    if record.kind == "define":
        place = find(record.target, against)
        # What upstream defines under a condition may be absent here: the live stage sees whether it is.
        if not place.attribute or (place.file and Source(place.file).definitions(place.attribute, conditional=False)):
            raise PatchError(f"{record.target} exists upstream now; it was to be defined")
        if len(place.attribute) > 1 and not Source(_file(place)).definitions(place.attribute[:-1]):
            raise PatchError(f"{place.module} has no class {'.'.join(place.attribute[:-1])}")
        return
    found, place = fingerprint(record.target, against=against)
    if not place.attribute and record.kind != "stub":
        raise PatchError(f"{record.target} is a module")
    if found != record.fingerprint:
        raise PatchError(f"the source changed: {record.fingerprint[:19]}... is recorded, {found[:19]}... is installed")


def _check_replacement(record: Record) -> None:
    if record.kind == "stub":
        return
    module, _, attribute = record.replacement.partition(":")
    place = locate(module)
    if place is None or place.attribute:
        raise PatchError(f"the replacement's module {module} does not exist")
    names = attribute.split(".") if attribute else []
    if names and place.file and not Source(place.file).definitions(names, imported=True):
        raise PatchError(f"the replacement {record.replacement} is not written in {place.file}")


def _file(place: Place) -> Path:
    if place.file is None:
        raise PatchError(f"{place.module} is not Python source")
    return place.file


def live(records: Sequence[Record], *, activate: str = ACTIVATE) -> dict[str, Finding]:
    """What stands at each target after `activate` (a line of Python) and the import of its module, by record id.

    Starts a process in which _inspect() looks at each target.
    """
    findings = {r.id: Finding(None, f"not on lane {_LANE}") for r in records if _LANE not in r.lanes}
    asked = [record for record in records if record.id not in findings]
    if not asked:
        return findings
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder, "task.json"), Path(folder, "answer.json")
        task.write_text(json.dumps([_question(record) for record in asked]))
        code = f"import sys; {activate}\nfrom nxdt_nemo.patching.verify import _inspect\n_inspect(*sys.argv[1:])"
        # -P: like the command nxdt-nemo, and unlike python -c, keep the current folder off sys.path.
        environment = os.environ | {"NXDT_NEMO_RUNTIME": _LANE}
        try:
            process = subprocess.run(
                [sys.executable, "-P", "-c", code, str(task), str(answer)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                check=False,
            )
            ended = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        except subprocess.TimeoutExpired:
            ended = f"not done after {_TIMEOUT} s"
        if not answer.exists():
            return findings | {record.id: Finding(False, f"the process ended: {ended}") for record in asked}
        answers = json.loads(answer.read_text())
    return findings | {record.id: Finding(*answers[record.id]) for record in asked}


def _question(record: Record) -> dict[str, Any]:
    """What the other process has to know. Upstream's own parameters come from its source: there they are gone."""
    place = locate(record.target)
    whole_module = place is None or (record.kind == "stub" and _is_module(place))
    return {
        "id": record.id,
        "place": record.place,
        "kind": record.kind,
        "replacement": record.replacement,
        "module": record.target if whole_module or place is None else place.module,
        "attribute": [] if whole_module or place is None else place.attribute,
        "upstream": _upstream_parameters(place) if record.kind == "replace" and place else None,
    }


def _is_module(place: Place) -> bool:
    """Whether a stub at this place is a module: what a package does not bind is asked for as one."""
    bound = place.file is not None and Source(place.file).definitions(place.attribute, imported=True)
    return not place.attribute or (place.package and not bound)


def _upstream_parameters(place: Place) -> list[_Parameter] | None:
    """The parameters of the one function (of a class: its own __init__) that the target is; None otherwise."""
    if place.file is None or not place.attribute:
        return None
    source = Source(place.file)
    found = source.definitions(place.attribute)
    if len(found) == 1 and isinstance(found[0], ast.ClassDef):
        found = source.definitions([*place.attribute, "__init__"])
    if len(found) != 1 or not isinstance(found[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    return _written_parameters(found[0].args)


def _written_parameters(args: ast.arguments) -> list[_Parameter]:
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    kinds = ["POSITIONAL_ONLY"] * len(args.posonlyargs) + ["POSITIONAL_OR_KEYWORD"] * len(args.args)
    found = [(a.arg, kind, i >= required) for i, (a, kind) in enumerate(zip(positional, kinds, strict=True))]
    if args.vararg:
        found.append((args.vararg.arg, "VAR_POSITIONAL", False))
    found += [
        (a.arg, "KEYWORD_ONLY", default is not None)
        for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg:
        found.append((args.kwarg.arg, "VAR_KEYWORD", False))
    return found


def _inspect(task: str, answer: str) -> None:
    """Run in the other process: answer the questions of the task file."""
    answers = {question["id"]: _answer(question) for question in json.loads(Path(task).read_text())}
    Path(answer).write_text(json.dumps(answers))


def _answer(question: dict[str, Any]) -> tuple[bool | None, str]:
    try:
        found: Any = importlib.import_module(question["module"])
        for name in question["attribute"]:
            found = inspect.getattr_static(found, name)
        why = _mismatch(question, found)
    except PatchError as error:
        if not str(error).startswith(question["place"]):  # fails closed: the first bad record stops the others
            return None, f"not reached: {error}"
        why = str(error).removeprefix(f"{question['place']}: ")
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed and importlib.util.find_spec(needed) is None:  # another product's, so nobody comes here either
            return None, f"not reached: it needs {needed}, which is not installed"
        why = f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever upstream raises when it is imported belongs into the report
        why = f"{type(error).__name__}: {error}"
    return not why, why


def _mismatch(question: dict[str, Any], found: Any) -> str:
    """Why what stands at the target is not what the record promises; "" if it is."""
    if question["kind"] == "stub":
        is_stub = isinstance(found, StubType | StubModule)
        return "" if is_stub else f"upstream's own {type(found).__name__} is there, not a stub"
    replacement = _function(load_object(question["replacement"]))
    layers = list(_layers(found))
    if not any(layer is replacement for layer in (found, *layers)):  # of None there are no layers
        return f"{found!r} is there, not {question['replacement']}"
    if question["upstream"] is None:
        return ""
    function = inspect.getattr_static(replacement, "__init__") if isinstance(replacement, type) else replacement
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""  # a C function says nothing about itself
    ours = [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]
    return incompatibility([(n, k, d) for n, k, d in question["upstream"]], ours)


def _layers(found: Any) -> Iterable[Any]:
    """What stands there: the object, and beneath wrappers of ours the wrapper itself and what it wraps."""
    layer = _function(found)
    while layer is not None:
        yield layer
        attributes = getattr(layer, "__dict__", {})
        if "__nxdt_wrapper__" in attributes:
            yield attributes["__nxdt_wrapper__"]
            layer = _function(attributes.get("__wrapped__"))
        else:
            layer = None


def _function(found: Any) -> Any:
    """The function in a staticmethod, classmethod or property; anything else as it is."""
    if isinstance(found, staticmethod | classmethod):
        return found.__func__
    return found.fget if isinstance(found, property) else found


def incompatibility(upstream: Sequence[_Parameter], ours: Sequence[_Parameter]) -> str:
    """Why a call that upstream's parameters allow would fail with ours; "" if none would."""
    positional = [name for name, kind, _ in ours if kind.startswith("POSITIONAL")]
    keywords = {name for name, kind, _ in ours if kind in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")}
    kinds, defaults = {kind for _, kind, _ in ours}, {name: default for name, _, default in ours}
    given = [name for name, kind, _ in upstream if kind.startswith("POSITIONAL")]
    for index, (name, kind, default) in enumerate(upstream):
        if kind.startswith("VAR"):
            if kind not in kinds:
                stars = "*" if kind == "VAR_POSITIONAL" else "**"
                return f"upstream takes {stars}{name}, ours does not"
            continue
        by_name = name in keywords
        if kind != "POSITIONAL_ONLY" and not by_name and "VAR_KEYWORD" not in kinds:
            return f"ours has no parameter {name}"
        if kind.startswith("POSITIONAL") and index >= len(positional) and "VAR_POSITIONAL" not in kinds:
            return f"ours does not take {name} by position"
        if kind == "POSITIONAL_OR_KEYWORD" and by_name and index < len(positional) and positional[index] != name:
            return f"position {index} is {name} upstream and {positional[index]} in ours"
        if default and by_name and not defaults[name]:
            return f"{name} may be left out upstream, not in ours"
    known = {name for name, _, _ in upstream} | set(positional[: len(given)])
    for name, kind, default in ours:
        if name not in known and not default and not kind.startswith("VAR"):
            return f"ours asks for {name}, which upstream does not have"
    return ""
