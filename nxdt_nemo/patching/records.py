"""Patch records: patches/*.toml as checked data.

Room patching/ (leaf). May import nxdt_nemo.errors and packaging. Proof: tests/patching/test_load.py.

    [dataset-norm]                                  # the id
    target      = "nemo.data.sets.TextDataset.norm" # module and attribute path, naming the defining class
    kind        = "replace"                        # replace | wrap | stub | define
    replacement = "nxdt_nemo.nemo.data.sets:norm"
    versions    = "nemo_toolkit>=2.4,<2.5"         # several: a list, or joined by " and "
    fingerprint = "sha256:..."                     # nxdt-nemo patches fingerprint TARGET
    why         = "..."
    remove_when = "..."
    lanes       = ["cpu", "xla", "neuron"]         # optional, all by default
    order       = 10                               # needed if two records share a target; lower is applied first

    kind     replacement                          fingerprint   the target
    replace  the new object ("mod" is a module)   required      must exist
    wrap     f(original, /, *args, **kwargs)      required      must exist
    stub     none                                 optional      may be absent; a module or a symbol
    define   the new object                       none          must not exist

views.toml beside them is no records file: nxdt_nemo/patching/view.py reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from packaging.requirements import InvalidRequirement, Requirement

from nxdt_nemo.errors import PatchError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["LANES", "Kind", "Record", "check_versions", "load"]

Kind = Literal["replace", "wrap", "stub", "define"]
LANES = ("cpu", "xla", "neuron")

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Record:
    """One change to one upstream name; the fields are those of the module's docstring."""

    id: str
    file: str  # the TOML file's name
    target: str
    kind: Kind
    replacement: str  # "" for a stub
    versions: tuple[str, ...]
    fingerprint: str  # "" for define, and for a stub that does not care
    why: str
    remove_when: str
    lanes: tuple[str, ...] = LANES
    order: int | None = None

    @property
    def place(self) -> str:
        """`nemo.toml [hydra-runner]`, how messages name it."""
        return f"{self.file} [{self.id}]"


_REQUIRED = ("target", "kind", "versions", "why", "remove_when")
_OPTIONAL = ("replacement", "fingerprint", "lanes", "order")


def load(folder: Path | Traversable) -> list[Record]:
    """All records of the folder's *.toml files, by file name and then as written.

    Raises PatchError naming file and record for anything that is not exactly as documented.
    """
    records: list[Record] = []
    files = [file for file in folder.iterdir() if file.name.endswith(".toml") and file.name != "views.toml"]
    for entry in sorted(files, key=lambda file: file.name):
        try:
            tables = tomllib.loads(entry.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PatchError(f"{entry.name}: not valid TOML: {error}") from error
        records += [_record(entry.name, name, table) for name, table in tables.items()]
    _check_together(records)
    return records


def check_versions(record: Record, installed: Callable[[str], str | None]) -> None:
    """Raise PatchError unless every distribution of the record is installed in its range."""
    for text in record.versions:
        requirement = Requirement(text)
        version = installed(requirement.name)
        if version is None:
            raise PatchError(f"{record.place}: {requirement.name} is not installed; the record holds for {text}")
        if not requirement.specifier.contains(version, prereleases=True):
            raise PatchError(
                f"{record.place}: {requirement.name} {version} is installed; the record holds for {text} only"
            )


def _record(file: str, name: str, table: object) -> Record:
    place = f"{file} [{name}]"
    if not isinstance(table, Mapping):
        raise PatchError(f"{file}: {name} stands outside a record; begin one with [id]")
    for key in table:
        if key not in _REQUIRED + _OPTIONAL:
            near = difflib.get_close_matches(key, _REQUIRED + _OPTIONAL, n=1)
            raise PatchError(f"{place}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    for key in _REQUIRED:
        if key not in table:
            raise PatchError(f"{place}: {key} is missing")
    kind = _text(place, table, "kind")
    if kind not in get_args(Kind):
        raise PatchError(f"{place}: kind = {kind!r} is not one of {', '.join(get_args(Kind))}")
    record = Record(
        id=name,
        file=file,
        target=_text(place, table, "target"),
        kind=cast(Kind, kind),
        replacement=_text(place, table, "replacement") if "replacement" in table else "",
        versions=_versions(place, table["versions"]),
        fingerprint=_text(place, table, "fingerprint") if "fingerprint" in table else "",
        why=_text(place, table, "why"),
        remove_when=_text(place, table, "remove_when"),
        lanes=_lanes(place, table.get("lanes", list(LANES))),
        order=_order(place, table.get("order")),
    )
    _check_names(record)
    return record


def _text(place: str, table: Mapping[str, Any], key: str) -> str:
    value = table[key]
    if not isinstance(value, str) or not value.strip():
        raise PatchError(f"{place}: {key} = {value!r} must be a text that says something")
    return value.strip()


def _versions(place: str, value: object) -> tuple[str, ...]:
    texts = value.split(" and ") if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise PatchError(f"{place}: versions = {value!r} must be a text or a list of texts")
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise PatchError(f"{place}: versions: {text!r} is not a distribution with a range: {error}") from error
        if not requirement.specifier or requirement.marker or requirement.url or requirement.extras:
            raise PatchError(f"{place}: versions: {text!r} must be one distribution with a range, such as 'torch>=2.9'")
    return tuple(text.strip() for text in texts)


def _lanes(place: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or any(lane not in LANES for lane in value):
        raise PatchError(f"{place}: lanes = {value!r} must be a list of {', '.join(LANES)}")
    return tuple(value)


def _order(place: str, value: object) -> int | None:
    if value is not None and type(value) is not int:  # a bool is an int
        raise PatchError(f"{place}: order = {value!r} must be a whole number")
    return value


def _check_names(record: Record) -> None:
    """The rules that need kind and name fields together."""
    dotted = "." in record.target or record.kind == "stub"  # a stub may be a whole distribution's package
    if not _DOTTED.fullmatch(record.target) or not dotted:
        raise PatchError(f"{record.place}: target = {record.target!r} must be module.path.name")
    if record.kind == "stub":
        if record.replacement:
            raise PatchError(f"{record.place}: a stub takes no replacement")
    else:
        module, colon, attribute = record.replacement.partition(":")
        if not _DOTTED.fullmatch(module) or (colon and not _DOTTED.fullmatch(attribute)):
            raise PatchError(f"{record.place}: replacement = {record.replacement!r} must be module.path:name")
    if record.kind in ("replace", "wrap") and not record.fingerprint:
        raise PatchError(f"{record.place}: fingerprint is missing; nxdt-nemo patches fingerprint {record.target}")
    if record.kind == "define" and record.fingerprint:
        raise PatchError(f"{record.place}: define takes no fingerprint: its target must not exist upstream")
    if record.fingerprint and not _FINGERPRINT.fullmatch(record.fingerprint):
        raise PatchError(f"{record.place}: fingerprint = {record.fingerprint!r} must be sha256: and 64 hex digits")


def _check_together(records: list[Record]) -> None:
    """Raise if two records have one id, or would meet on one target in an order that nobody chose."""
    ids: dict[str, Record] = {}
    for record in records:
        if record.id in ids:
            raise PatchError(f"{record.place}: the id is taken by {ids[record.id].place}")
        for other in ids.values():
            _check_pair(other, record)
        ids[record.id] = record


def _check_pair(first: Record, second: Record) -> None:
    if not set(first.lanes) & set(second.lanes):
        return
    if first.target == second.target:
        if first.order is None or second.order is None or first.order == second.order:
            raise PatchError(
                f"{second.place}: {second.target} is the target of {first.place} too; give both a different order"
            )
    elif second.target.startswith(first.target + ".") or first.target.startswith(second.target + "."):
        # The inner one would be installed on an object that the outer one takes away.
        raise PatchError(f"{second.place}: {second.target} and {first.target} of {first.place} lie in one another")
