"""What a migration did to every key: as a table, as JSON, or as Markdown for a pull request.

Room config/ (leaf). May import the standard library, and rich while it renders.
Proof: tests/config/migrate/test_report.py.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any, Literal

from nxdt_nemo.config.report import shown

__all__ = ["ACTIONS", "LEVELS", "Entry", "MigrationReport"]

Action = Literal["kept", "moved", "renamed", "mapped", "derived", "dropped", "unknown"]
Level = Literal["", "question", "warning", "error"]
ACTIONS: tuple[Action, ...] = ("kept", "moved", "renamed", "mapped", "derived", "dropped", "unknown")
LEVELS: tuple[Level, ...] = ("question", "warning", "error")


@dataclass(frozen=True)
class Entry:
    """One key's lot.

    key      its path in the file that was read; "" for a key that was added
    action   one of ACTIONS: the last that happened to it (a key that moves and gets another value is mapped)
    to       its path in the file that is written; "" for a dropped one
    old, new its value before and after
    why      the reason, a sentence without a full stop
    level    "", or that a person has to look: question, warning, error
    """

    key: str
    action: Action
    to: str = ""
    old: Any = None
    new: Any = None
    why: str = ""
    level: Level = ""


@dataclass
class MigrationReport:
    """Every key of a file, in its order, the added ones last.

    place, dialect, target   the file, its dialect, and the instance or lane asked for ("" for none)
    findings                 (level, line) of what the checks of a run say about the result
    """

    place: str
    dialect: str
    target: str = ""
    entries: list[Entry] = field(default_factory=list)
    findings: list[tuple[Level, str]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Number of keys by action, and of entries and findings by level."""
        actions = Counter(entry.action for entry in self.entries)
        levels = Counter(entry.level for entry in self.entries) + Counter(level for level, _ in self.findings)
        return {name: actions[name] for name in ACTIONS} | {name: levels[name] for name in LEVELS}

    @property
    def changed(self) -> list[Entry]:
        """The entries that are worth a line: all but what stays without a word."""
        return [entry for entry in self.entries if entry.action != "kept" or entry.level]

    @property
    def errors(self) -> list[str]:
        """A line for each error."""
        own = [
            f"{entry.key or entry.to}={shown(entry.old)}: {entry.why}"
            for entry in self.entries
            if entry.level == "error"
        ]
        return own + [line for level, line in self.findings if level == "error"]

    def summary(self) -> str:
        """The counts in one line."""
        counts = {name: number for name, number in self.counts().items() if number}
        words = [f"{number} {name}{'s' if name in LEVELS and number > 1 else ''}" for name, number in counts.items()]
        return f"{self.place}: {self.dialect} -> nemo 2.4: {', '.join(words) or 'no keys'}"

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "file": self.place,
            "from": self.dialect,
            "target": self.target,
            "counts": self.counts(),
            "keys": [asdict(entry) for entry in self.entries],
            "findings": [{"level": level, "text": text} for level, text in self.findings],
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, key and where it is now, value, because) of each entry that is worth a line."""
        return [(_what(entry), _where(entry), _value(entry), entry.why) for entry in self.changed]

    @property
    def kept(self) -> list[str]:
        """The keys that stay as they are, without a word."""
        return [entry.key for entry in self.entries if entry.action == "kept" and not entry.level]

    def render(self, width: int | None = None) -> str:
        """A table of plain text, the kept keys by name, the findings, and the summary; width in characters."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("what", "key", "value", "because"):
            table.add_column(name, overflow="fold", no_wrap=name != "because")
        for row in self.rows():
            table.add_row(*map(Text, row))
        width = width or max(140, shutil.get_terminal_size((160, 24)).columns)
        out = StringIO()
        if table.row_count:
            Console(file=out, width=width, color_system=None, highlight=False).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        if self.kept:
            lines += ["", f"kept as they are: {', '.join(self.kept)}"]
        return "\n".join([*lines, "", *(f"{level}: {text}" for level, text in self.findings), self.summary()])

    def as_markdown(self) -> str:
        """A table for a pull request."""
        lines = [f"**{_plain(self.summary())}**", ""]
        rows = self.rows()
        if rows:
            lines += ["| What | Key | Value | Because |", "|---|---|---|---|"]
        for what, key, value, why in rows:
            first, _, second = key.partition("\n-> ")
            where = f"{_code(first)} → {_code(second)}" if second else _code(first)
            lines.append(f"| {what} | {where} | {_code(value)} | {_plain(why)} |")
        if self.findings:
            lines += ["", *(f"- {level}: {_plain(text)}" for level, text in self.findings)]
        if self.kept:
            lines += ["", f"Kept as they are: {', '.join(map(_code, self.kept))}."]
        return "\n".join(lines) + "\n"


def _what(entry: Entry) -> str:
    return f"{entry.action}, {entry.level}" if entry.level else entry.action


def _where(entry: Entry) -> str:
    if not entry.key:
        return f"+ {entry.to}"
    return entry.key if entry.to in ("", entry.key) else f"{entry.key}\n-> {entry.to}"


def _value(entry: Entry) -> str:
    if entry.action in ("dropped", "unknown"):
        return shown(entry.old)
    if not entry.key:
        return shown(entry.new)
    return shown(entry.new) if entry.old == entry.new else f"{shown(entry.old)} -> {shown(entry.new)}"


def _code(text: str) -> str:
    return f"`{_plain(text)}`" if text else ""


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
