"""What checking a configuration found: one Report.

Room config/ (leaf). Stands in for nothing upstream. May import the standard library and nxdt_nemo's errors and
console; rich while it renders. Proof: tests/config/test_report.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nxdt_nemo import console
from nxdt_nemo.errors import ConfigError

if TYPE_CHECKING:
    from nxdt_nemo.config.job import Job
    from nxdt_nemo.config.neuron import NeuronConfig
    from nxdt_nemo.config.values import Default

__all__ = ["GONE", "Change", "Ignored", "Report", "Unknown", "or_list"]

GONE = "(left out)"
"""The new value of a change that takes a key out."""
FOREIGN = 3  # keys of another product in a config of that product; fewer are left over


@dataclass(frozen=True)
class Change:
    """A value that is replaced, so that NeMo's code runs on this backend."""

    key: str
    old: Any
    new: Any
    why: str


class Ignored(NamedTuple):
    """A value that has no meaning here; it stays in the config and nothing reads it."""

    key: str
    value: Any
    instead: str


@dataclass(frozen=True)
class Unknown:
    """A key that nobody reads.

    suggestion   the key that was probably meant: its name alone within the same section, else the whole path
    source       the product that does have this key, when it is a known one
    """

    path: str
    suggestion: str = ""
    source: str = ""

    def __str__(self) -> str:
        if self.source:
            here = f"here {self.suggestion}" if self.suggestion else "nothing reads it here"
            here += ", where nxdt-nemo migrate moves it" if self.suggestion.startswith("neuron.") else ""
            return f"unknown key {self.path}; it is a key of {self.source}, {here}"
        if self.suggestion:
            return f"unknown key {self.path}; did you mean {self.suggestion}?"
        return f"unknown key {self.path}; nothing reads it"


@dataclass
class Report:
    """All that a check found, in the order of the rules.

    errors     each ends the run
    warnings   lines to print; one for each unknown key is among them unless neuron.strict_keys made it an error
    changes    values that sanitise() replaces
    ignored    values without a meaning here that differ from NeMo's own defaults
    unknown    keys that nobody reads
    doubts     what NeMo takes without a word and nobody can have meant; among the warnings, or the errors when strict
    defaults   keys that such a model's config usually writes and this one does not, with what they are then
    to_be_set  keys whose value is `???`
    neuron     our own section, None when the config has none
    job        what the environment of the run depends on; None when nothing of this backend applies
    """

    errors: list[ConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    ignored: list[Ignored] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    doubts: list[ConfigError] = field(default_factory=list)
    defaults: list[Default] = field(default_factory=list)
    to_be_set: list[str] = field(default_factory=list)
    neuron: NeuronConfig | None = None
    job: Job | None = None

    @property
    def foreign(self) -> str:
        """What the config is written for, when several keys are of another product; "" else."""
        sources = [key.source for key in self.unknown if key.source]
        product = max(sources, key=sources.count, default="")
        return product if sources.count(product) >= FOREIGN else ""

    def raise_foreign(self, config: Path) -> None:
        """Raise ConfigError for a file whose keys are another product's."""
        if self.foreign:
            fix = f"nxdt-nemo migrate {config} -o NEW.yaml, and take that"
            raise ConfigError(f"is written for {self.foreign}", place=config.name, fix=fix)

    def raise_first(self) -> None:
        """Raise the first error, if there is one."""
        if self.errors:
            raise self.errors[0]

    def render(self, width: int | None = None) -> str:
        """The changed and ignored keys as a table of plain text; "" when there are none. width in characters."""
        if not self.changes and not self.ignored:
            return ""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("key", "value", "here", "because"):
            table.add_column(name, overflow="fold", no_wrap=name != "because")
        for change in self.changes:
            table.add_row(*map(Text, (change.key, shown(change.old), shown(change.new), change.why)))
        for key, value, instead in self.ignored:
            table.add_row(*map(Text, (key, shown(value), "ignored", instead)))
        width = width or max(100, shutil.get_terminal_size((120, 24)).columns)
        out = StringIO()
        Console(file=out, width=width, color_system=None, highlight=False).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def show(self) -> None:
        """Print warnings and table on rank 0."""
        if not console.is_rank_zero():
            return
        for line in self.warnings:
            console.warn(line)
        if table := self.render():
            console.notice(f"settings that mean something else on this backend\n{table}")


def shown(value: Any) -> str:
    """A value as YAML would write it, cut to a table cell."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 24 else text[:21] + "..."


def or_list(values: Iterable[object]) -> str:
    """`1, 2 or 4`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
