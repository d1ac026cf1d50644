"""The table of a migration: what happens to each key of each dialect, and why.

Room config/ (leaf). configs/migrate/*.toml says it all: this file reads it, and docs/migrate_keys.md is made from it.
Stands in for the two CSV tables that AWS documents (nnm_nxdt_mapping.csv, nemo_nxdt_mapping.csv).
Proof: tests/config/migrate/test_rules.py.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from nxdt_nemo._resources import folder
from nxdt_nemo.errors import NxdtError

__all__ = ["ACTIONS", "DIALECTS", "Rule", "rule_for", "table"]

DIALECTS = {
    "nemo": "NVIDIA NeMo 1.14 to 2.4, Megatron models from YAML",
    "nnm": "neuronx-nemo-megatron: NeMo 1.14 with AWS's keys",
    "nxdt": "NxD Training: its own top-level keys",
}
# keep stays; move has another path; rename another name; map another value; drop goes; derive is worked out of several
# keys by a function of derive.py; default is added where it is absent; warn and error stay, and a person is needed.
ACTIONS = ("keep", "move", "rename", "map", "drop", "derive", "default", "warn", "error")


@dataclass(frozen=True)
class Rule:
    """One entry of configs/migrate/.

    key      dotted path, `*` for one name, `**` at the end for any path below; several may be given
    dialect  the dialects that have this key
    action   one of ACTIONS
    why      for the report and the page: one sentence without a full stop
    to       the path in NeMo's schema, with `*` for what `*` or `**` stood for (a key without one: its name)
    values   [theirs, ours] pairs; of a default its one value
    when     the values that the rule is for; all when empty
    by       of a derive the function's name
    known    the rule is for keys of NeMo's own table only (configs/keys)
    source   where it is written or read, beside the dialect's own files
    """

    key: tuple[str, ...]
    dialect: tuple[str, ...]
    action: str
    why: str
    to: str = ""
    values: tuple[tuple[Any, Any], ...] = ()
    when: tuple[Any, ...] = ()
    by: str = ""
    known: bool = False
    source: str = ""
    value: Any = None
    file: str = field(default="", compare=False)

    def match(self, path: str) -> str | None:
        """What the wildcard stands for, "" without one; None if the rule is not for this path."""
        for pattern, text in self._patterns:
            if found := pattern.fullmatch(path):
                return found[1] if "*" in text else ""
        return None

    def target(self, path: str) -> str:
        """Where the rule puts a path."""
        wild = self.match(path) or path.rpartition(".")[2]
        return self.to.replace("**", "*").replace("*", wild) if self.to else path

    def mapped(self, value: Any) -> Any:
        """The value in our terms."""
        return next((ours for theirs, ours in self.values if same(theirs, value)), value)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        made = []
        for text in self.key:
            quoted = re.escape(text).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)")
            made.append((re.compile(quoted), text))
        return made


def same(theirs: Any, value: Any) -> bool:
    """Equality without True being 1; TOML has no null, which is written "null"."""
    if value is None:
        return bool(theirs == "null")
    return type(theirs) is type(value) and bool(theirs == value)


@cache
def table() -> tuple[Rule, ...]:
    """All rules; the first that fits a key is its rule.

    Raises NxdtError for a rule that cannot be: it is our own file.
    """
    found: list[Rule] = []
    for file in sorted((folder("configs") / "migrate").glob("*.toml")):
        loaded = tomllib.loads(file.read_text(encoding="utf-8"))
        for entry in loaded["rule"]:
            found.append(_rule(entry, tuple(loaded["dialect"]), file.name))
    return tuple(found)


def rule_for(path: str, value: Any, dialect: str, knows: bool) -> Rule | None:
    """The rule of a key with a value; `knows` says whether NeMo's own table has the key."""
    return next(_fitting(path, value, dialect, knows), None)


def _fitting(path: str, value: Any, dialect: str, knows: bool) -> Iterator[Rule]:
    for rule in table():
        if dialect not in rule.dialect or rule.action == "default" or (rule.known and not knows):
            continue
        if rule.match(path) is None or (rule.when and not any(same(one, value) for one in rule.when)):
            continue
        yield rule


def _rule(entry: dict[str, Any], dialect: tuple[str, ...], file: str) -> Rule:
    keys = entry["key"]
    values = tuple((pair[0], _null(pair[1])) for pair in entry.get("values", ()))
    made = Rule(
        **entry
        | {
            "key": (keys,) if isinstance(keys, str) else tuple(keys),
            "dialect": tuple(entry.get("dialect", dialect)),
            "values": values,
            "when": tuple(entry.get("when", ())),
            "value": _null(entry.get("value")),
            "file": file,
        }
    )
    needs_target = made.action in ("move", "rename") and not made.to
    if made.action not in ACTIONS or needs_target or not made.why or (made.action == "derive") != bool(made.by):
        raise NxdtError(f"configs/migrate/{file}: the rule of {made.key[0]} is not complete")
    return made


def _null(value: Any) -> Any:
    return None if value == "null" else value
