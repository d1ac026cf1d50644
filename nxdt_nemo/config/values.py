"""What value a key takes: its kind, its range, its names; which keys a model cannot do without, and what the others
are when nobody writes them.

Room config/ (leaf). Stands in for what NeMo, megatron-core and Lightning raise from many places, or do not notice. The
tables are data: configs/keys/values-*.json is written by tools/keys.py from upstream's source, values.toml and
required.toml by hand. May import the standard library and nxdt_nemo's _resources and errors.
Proof: tests/config/test_values.py, tools/fuzz.py.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from nxdt_nemo._resources import folder
from nxdt_nemo.config.keys import KeyTable
from nxdt_nemo.config.keys import load as load_keys
from nxdt_nemo.config.report import or_list, shown
from nxdt_nemo.config.view import MISSING, View
from nxdt_nemo.errors import ConfigError

__all__ = ["ERRORS", "RESTORED", "Default", "ValueTable", "defaults", "kind_of_model", "load", "to_be_set"]

Errors = Iterator[ConfigError]

WORDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "dict": "a section",
}
RESTORED = "as in model.restore_from_path"
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Default:
    """A key that the config does not write, and what it is then: as YAML would write it, or in words.

    common  whether most configs of such a model do write it
    """

    key: str
    value: Any
    common: bool = False


@dataclass(frozen=True)
class ValueTable:
    """The tables, by path.

    kinds      path -> YAML's kinds that it takes; a pattern where a path has none of its own
    least, most, choices   pattern or path -> bound, names
    defaults   path -> value when it is not written
    required   kind of model -> path -> why
    usual      kind of model -> the keys that NeMo's stock YAMLs of it, or ours, write
    common     kind of model -> those of them that many do
    """

    kinds: dict[str, tuple[str, ...]]
    least: dict[str, Any]
    most: dict[str, float]
    choices: dict[str, tuple[str, ...]]
    defaults: dict[str, Any]
    required: dict[str, dict[str, str]]
    usual: dict[str, frozenset[str]]
    common: dict[str, frozenset[str]]
    _memo: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)

    def find(self, table: str, path: str) -> Any:
        """A table's entry for a path: its own, else the first pattern that fits; None without one."""
        if (table, path) not in self._memo:
            entries: Mapping[str, Any] = getattr(self, table)
            found = entries.get(path)
            if found is None:
                found = next((entries[p] for p in entries if "*" in p and fnmatchcase(path, p)), None)
            if found is None and (other := _alike(path)):
                found = self.find(table, other)
            self._memo[table, path] = found
        return self._memo[table, path]

    def default(self, path: str) -> Default | None:
        """What a key is when it is not written; None if that is not known."""
        known = path if path in self.defaults else _alike(path)
        if known in self.defaults:
            return Default(path, self.defaults[known])
        pattern = next((p for p in self.defaults if "*" in p and fnmatchcase(path, p)), None)
        return None if pattern is None else Default(path, self.defaults[pattern])


# A T5's sides are models, and data sets of tuning are read by the same code as a model's data.
ALIKE = {
    **{f"model.{side}": "model" for side in ("encoder", "decoder")},
    **{f"model.data.{split}": "model.data" for split in ("train_ds", "validation_ds", "test_ds")},
}


def _alike(path: str) -> str:
    """The key elsewhere that is read alike; "" if there is none."""
    section, _, name = path.rpartition(".")
    return f"{ALIKE[section]}.{name}" if section in ALIKE else ""


@cache
def load() -> ValueTable:
    """The tables in configs/keys/."""
    where = folder("configs") / "keys"
    kinds: dict[str, tuple[str, ...]] = {}
    known: dict[str, Any] = {}
    choices: dict[str, tuple[str, ...]] = {}
    usual: dict[str, set[str]] = {}
    common: dict[str, set[str]] = {}
    for file in sorted(where.glob("values-*.json")):
        for section, keys in json.loads(file.read_text(encoding="utf-8")).items():
            for name, entry in keys.items():
                path = f"{section}.{name}" if section else name
                if "kinds" in entry:
                    kinds[path] = tuple(entry["kinds"])
                if "default" in entry:
                    known[path] = entry["default"]
                if "choices" in entry:
                    choices[path] = tuple(entry["choices"])
                for model in entry.get("in", ()):
                    usual.setdefault(model, set()).add(path)
                for model in entry.get("common", ()):
                    common.setdefault(model, set()).add(path)
    hand = tomllib.loads((where / "values.toml").read_text(encoding="utf-8"))
    needed = tomllib.loads((where / "required.toml").read_text(encoding="utf-8"))
    kinds |= {path: tuple(names) for path, names in hand["kinds"].items()}
    choices |= {path: tuple(names) for path, names in hand["choices"].items()}
    known |= {path: None if value == "null" else value for path, value in hand["defaults"].items()}
    return ValueTable(
        kinds=kinds,
        least=hand["least"],
        most=hand["most"],
        choices=choices,
        defaults=known,
        required=needed,
        usual={model: frozenset(paths) for model, paths in usual.items()},
        common={model: frozenset(paths) for model, paths in common.items()},
    )


def kind_of_model(view: View) -> str:
    """gpt, bert, t5 or tuning: which of NeMo's classes on megatron-core reads this config; "" for none of these."""
    if view.has("model.retro") or view.get("neuron.alignment.dpo") or view.get("neuron.alignment.orpo"):
        return ""
    if view.get("model.data.train_ds") is not None:
        tuned = view.has("model.peft") or (view.get("model.mcore_gpt", False) and view.has("model.restore_from_path"))
        return "tuning" if tuned and not view.has("quantization") else ""
    return next((kind for kind in ("gpt", "bert", "t5") if view.get(f"model.mcore_{kind}", False)), "")


# --- kinds --------------------------------------------------------------------------------------------------------


def kinds(view: View) -> Errors:
    """A value of another kind than upstream reads; a number written as text is a number.

    Other rules may take the rest to be of its kind: what is not reads as absent from here on.
    """
    table, keys = load(), load_keys()
    for path, value in list(view.items()):
        if value is None or value == MISSING or path in view.interpolated:
            continue  # an interpolation's value is judged where it stands
        wanted = _kinds(path, table, keys)
        if wanted and not _is_one(value, wanted):
            yield view.error(f"{path}={shown(value)} is not {or_list(_words(wanted))}", _hint(value, wanted))
            view.forget(path)


def _kinds(path: str, table: ValueTable, keys: KeyTable) -> tuple[str, ...]:
    known: tuple[str, ...] | None = table.find("kinds", path)
    if known == ():
        return ()
    known = known or ()
    if path in keys.sections and "dict" not in known:
        # A section's name, but for the few that are a value elsewhere.
        known = (*known, "dict") if path in table.kinds else ("dict",)
    return known


def _is_one(value: Any, wanted: tuple[str, ...]) -> bool:
    numeric = "int" in wanted or "float" in wanted
    match value:
        case bool():
            return "bool" in wanted
        case int():
            return numeric or "str" in wanted or ("bool" in wanted and value in (0, 1))
        case float():
            return "float" in wanted or "str" in wanted
        case str():
            return "str" in wanted or (numeric and NUMBER.fullmatch(value.strip()) is not None)
        case list():
            return "list" in wanted
        case dict():
            return "dict" in wanted
    return True


def _words(wanted: tuple[str, ...]) -> list[str]:
    narrow = [kind for kind in wanted if kind != "int" or "float" not in wanted]
    return [WORDS[kind] for kind in WORDS if kind in narrow]


def _hint(value: Any, wanted: tuple[str, ...]) -> str:
    if wanted == ("list",) and isinstance(value, str | int | float):
        return f"write [{value}]"
    if wanted == ("bool",) and str(value).lower() in ("true", "false"):
        return "write it without quotes"
    return ""


# --- ranges and names ---------------------------------------------------------------------------------------------


def ranges(view: View) -> Errors:
    """Numbers outside what they can be. A number of a known key is not negative unless the table says so."""
    table, keys = load(), load_keys()
    for path, value in view.items():
        if isinstance(value, bool) or not _number(value) or path in view.interpolated:
            continue
        if not keys.knows(path) or keys.is_free(_section(path)):
            continue
        number = float(value)
        least, most = table.find("least", path), table.find("most", path)
        bound = 0 if least is None else least
        if bound != "any" and number < bound:
            yield view.error(f"{path}={value} is less than {bound}", f"use {bound} or more")
        elif most is not None and number > most:
            yield view.error(f"{path}={value} is more than {most:g}", f"use {most:g} or less")


def _section(path: str) -> str:
    return path.rpartition(".")[0]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and NUMBER.fullmatch(value.strip()) is not None)


def betas(view: View) -> Errors:
    """Adam's decay rates: two numbers of at least 0 and less than 1."""
    value = view.get("model.optim.betas")
    if isinstance(value, list) and not (len(value) == 2 and all(_number(b) and 0 <= float(b) < 1 for b in value)):
        yield view.error(f"model.optim.betas={value} is not two numbers from 0 to below 1", "use [0.9, 0.95]")


def choices(view: View) -> Errors:
    """A name that the key does not take."""
    table = load()
    for path, value in view.items():
        if not isinstance(value, str) or value == MISSING:
            continue
        names = table.find("choices", path)
        if names is None or value.lower() in (name.lower() for name in names):
            continue
        near = get_close_matches(value, names, n=1)
        yield view.error(
            f"{path}={value} is not known", f"did you mean {near[0]}?" if near else f"use {or_list(names)}"
        )


def devices(view: View) -> Errors:
    """A number, a list of them, or auto."""
    value = view.get("trainer.devices")
    if isinstance(value, str) and value != "auto" and NUMBER.fullmatch(value.strip()) is None:
        yield view.error(f"trainer.devices={value} is not a number of devices", "use a number, or auto")


def splits(view: View) -> Errors:
    """Shares of training, validation and test."""
    key = "model.data.splits_string"
    value = view.get(key)
    shares = value if isinstance(value, list) else str(value).split(",")
    if value is not None and not all(_number(str(share)) and float(share) >= 0 for share in shares):
        yield view.error(f"{key}={shown(value)} is not shares of the data", "write 980,10,10")


# --- what has to be there -----------------------------------------------------------------------------------------


def missing(view: View) -> Errors:
    """Keys that NeMo reads without a default of its own; `???` is for whoever starts the run to give."""
    if view.section or not view.training:
        return
    for path, why in load().required.get(kind_of_model(view), {}).items():
        if view.has(path) and (view.raw(path) is not None or why.endswith("may be null")):
            continue
        if path in view.forgotten or view.unresolved(path):
            continue  # said already
        section = _section(path)
        if section and not isinstance(view.raw(section), dict):
            continue  # said once, for the section, where that is required
        state = "is null" if view.has(path) else "is not set"
        yield view.error(f"{path} {state}: {why.removesuffix(', may be null')}", f"set {path}")


def to_be_set(view: View) -> list[str]:
    """Keys whose value is `???`."""
    return [path for path, value in view.items() if value == MISSING]


def defaults(view: View) -> list[Default]:
    """The usual keys of such a model that this config does not write, and what they are then."""
    table, model = load(), kind_of_model(view)
    found = []
    for path in sorted(table.usual.get(model, frozenset())):
        section = _section(path)
        if view.has(path) or (section and not isinstance(view.raw(section), dict)):
            continue
        if model == "tuning" and section == "model":
            found.append(Default(path, RESTORED, common=path in table.common[model]))
        elif (default := table.default(path)) is not None:
            found.append(replace(default, common=path in table.common[model]))
    return found


ERRORS = (kinds, ranges, betas, devices, splits, choices, missing)
