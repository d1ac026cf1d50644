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
from collections.abc import Iterator
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

    def nearest(self, path: str) -> Unknown:
        """An unknown key with the key that was probably meant."""
        section, _, name = path.rpartition(".")
        if path in self.elsewhere:
            source, here = self.elsewhere[path]
            return Unknown(path, here, source)
        near = difflib.get_close_matches(name, self.sections.get(section, ()), n=1, cutoff=0.8)
        if near:
            return Unknown(path, near[0])
        homes = [other for other, names in self.sections.items() if name in names and other != section]
        home = min(homes, key=lambda other: (other.count("."), other != "model", other), default=None)
        return Unknown(path, "" if home is None else f"{home}.{name}".lstrip("."))


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
    cfg: DictConfig, *, section: str = "", also: frozenset[str] = frozenset(), table: KeyTable | None = None
) -> list[Unknown]:
    """The keys of a config that nobody reads, outermost only, in the order of the config.

    section   path of cfg within the whole config ("model" for the model's own section)
    also      names that somebody else reads, such as the user's own script
    """
    table = table or load()
    raw = OmegaConf.to_container(cfg, resolve=False)
    return [table.nearest(path) for path in _walk(raw, section, table) if path.rpartition(".")[2] not in also]


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


def _walk(node: Any, section: str, table: KeyTable) -> Iterator[str]:
    """Paths of unknown keys in and below a section that the table has."""
    if isinstance(node, list):
        for entry in node:
            yield from _walk(entry, section, table)
    if not isinstance(node, dict) or "_target_" in node:
        return
    for key, value in node.items():
        path = f"{section}.{key}" if section else str(key)
        if str(key) not in table.sections[section]:
            yield path
        elif not table.is_free(path):
            yield from _walk(value, path, table)
