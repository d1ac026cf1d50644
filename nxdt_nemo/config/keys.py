"""Every key that NeMo knows, and the nearest one for a key that it does not know.

Room config/ (leaf). Stands in for nothing upstream: NeMo reads a mistyped key as absent. The table is data:
configs/keys/nemo-*.json is written by tools/keys.py, extra.toml and elsewhere.toml by hand.
May import omegaconf and nxdt_nemo._resources. Proof: tests/config/test_keys.py.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nxdt_nemo._resources import folder
from nxdt_nemo.config.report import Unknown

__all__ = ["KeyTable", "load", "names_in", "unknown_keys"]


@dataclass(frozen=True)
class KeyTable:
    """The known keys.

    sections    section path ("" is the top level) -> names in it
    free        patterns of sections whose keys are anybody's (constructor arguments, file lists)
    elsewhere   path -> (product that has this key, what stands for it here or "")
    versions    the upstream releases that the table was made from
    """

    sections: dict[str, frozenset[str]]
    free: tuple[str, ...]
    elsewhere: dict[str, tuple[str, str]]
    versions: dict[str, str]

    def is_free(self, path: str) -> bool:
        """True if the keys below path are not ours to judge."""
        return path not in self.sections or any(fnmatchcase(path, pattern) for pattern in self.free)

    def knows(self, path: str) -> bool:
        """True if NeMo reads this key."""
        section, _, name = path.rpartition(".")
        if section and not self.knows(section):
            return False
        return (section != "" and self.is_free(section)) or name in self.sections[section]

    def nearest(self, path: str, written: Collection[str] = ()) -> Unknown:
        """An unknown key with the key that was probably meant: rather one that its section does not write."""
        section, _, name = path.rpartition(".")
        if path in self.elsewhere:
            source, here = self.elsewhere[path]
            return Unknown(path, here, source)
        if near := _closest(name, self.sections.get(section, ()), written):
            return Unknown(path, near)
        homes = [other for other, names in self.sections.items() if name in names and other != section]
        home = min(homes, key=lambda other: (other.count("."), other != "model", other), default=None)
        return Unknown(path, "" if home is None else f"{home}.{name}".lstrip("."))


def _closest(name: str, known: Collection[str], written: Collection[str]) -> str:
    """The known name that a misspelt one is closest to, rather one that is not written; "" if none is close."""
    near = difflib.get_close_matches(name, known, n=12, cutoff=0.6)
    ranked = sorted((_slips(name, other) + 0.75 * (other in written), at) for at, other in enumerate(near))
    if not ranked or ranked[0][0] > max(1.75, len(name) / 4):
        return ""
    return near[ranked[0][1]]


def _slips(name: str, other: str) -> int:
    """Letters left out, added, changed, or swapped with their neighbour (optimal string alignment)."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(name, 1):
        row = [i]
        for j, meant in enumerate(other, 1):
            steps = [rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != meant)]
            if i > 1 and j > 1 and letter == other[j - 2] and name[i - 2] == meant:
                steps.append(rows[-2][j - 2] + 1)
            row.append(min(steps))
        rows.append(row)
    return rows[-1][-1]


@cache
def load(where: Path | None = None) -> KeyTable:
    """The table in configs/keys/ (or in another folder of the same layout)."""
    where = where or folder("configs") / "keys"
    sections: dict[str, set[str]] = {}
    versions: dict[str, str] = {}
    for file in sorted(where.glob("nemo-*.json")):
        made = json.loads(file.read_text(encoding="utf-8"))
        versions |= made["versions"]
        for section, names in made["sections"].items():
            sections.setdefault(section, set()).update(names)
    extra = tomllib.loads((where / "extra.toml").read_text(encoding="utf-8"))
    for section, names in extra["sections"].items():
        sections.setdefault(section, set()).update(names)
    products = tomllib.loads((where / "elsewhere.toml").read_text(encoding="utf-8"))
    return KeyTable(
        sections={section: frozenset(names) for section, names in sections.items()},
        free=tuple(extra["free"]),
        elsewhere={path: (name, here) for name, paths in products.items() for path, here in paths.items()},
        versions=versions,
    )


def unknown_keys(
    cfg: DictConfig | dict[str, Any],
    *,
    section: str = "",
    also: frozenset[str] = frozenset(),
    table: KeyTable | None = None,
) -> list[Unknown]:
    """The keys of a config that nobody reads, outermost only, in the order of the config.

    section   path of cfg within the whole config ("model" for the model's own section)
    also      names that somebody else reads, such as the user's own script
    """
    table = table or load()
    raw = cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=False)
    unknown = (found for found in _walk(raw, section, table) if found[0].rpartition(".")[2] not in also)
    return [table.nearest(path, written) for path, written in unknown]


def names_in(script: Path) -> frozenset[str]:
    """Names that a script uses as attributes or in texts: the keys that it may read itself.

    Empty for a script that cannot be read or does not parse.
    """
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            found.update(re.findall(r"\w+", node.value))
    return frozenset(found)


def _walk(node: Any, section: str, table: KeyTable) -> Iterator[tuple[str, Collection[str]]]:
    """Unknown keys in and below a section that the table has, each with the names beside it."""
    if isinstance(node, list):
        for entry in node:
            yield from _walk(entry, section, table)
    if not isinstance(node, dict) or "_target_" in node:
        return
    for key, value in node.items():
        path = f"{section}.{key}" if section else str(key)
        if str(key) not in table.sections[section]:
            yield path, node.keys()
        elif not table.is_free(path):
            yield from _walk(value, path, table)
