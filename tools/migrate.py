"""Every configuration of NeMo v2.4.0, NxD Training and NNM through `nxdt-nemo migrate`: what becomes of its keys.

    NXDT_NEMO_CHECKOUT=... NXDT_CHECKOUT=... NNM_CHECKOUT=... python tools/migrate.py
                                     # seconds; writes docs/results/migrate.md
    ... python tools/migrate.py --keys   # the keys of each dialect, into tests/config/migrate/data

Each is migrated, read back, and migrated again, which must change nothing; NNM's once more with its train_setup.sh.
Exit code 1 when one cannot be, when a key is dropped without a reason, or when a key has no rule.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nxdt_nemo.config.migrate import MigrationReport, migrate
from nxdt_nemo.config.migrate.report import ACTIONS, LEVELS
from nxdt_nemo.config.migrate.tree import Document
from nxdt_nemo.testing.migrated import CHECKOUTS, config_files

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "migrate.md"
KEYS = ROOT / "tests" / "config" / "migrate" / "data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", action="store_true", help="write the lists of keys that the tests read")
    args = parser.parse_args()
    if missing := [name for name, _ in CHECKOUTS.values() if not os.environ.get(name)]:
        raise SystemExit(f"{', '.join(missing)}: name the checkouts, see --help")
    if args.keys:
        return write_keys()
    rows: list[tuple[str, MigrationReport, str]] = []
    for dialect in CHECKOUTS:
        for file in config_files(dialect):
            rows.append((dialect, *one(file)))
            print(rows[-1][1].summary(), rows[-1][2])
    RESULT.write_text(markdown(rows), encoding="utf-8")
    return 1 if any(fault for _, _, fault in rows) else 0


def one(file: Path) -> tuple[MigrationReport, str]:
    """The report of a file, and what is wrong with it ("" for nothing)."""
    text = file.read_text(encoding="utf-8")
    found = migrate(text, place=file.name)
    again = migrate(found.text, place=file.name)
    OmegaConf.create(found.text)
    entries = found.report.entries
    said = {entry.key for entry in entries}
    keys = [node.path for node in Document(text).nodes() if not node.is_section]
    faults = [f"no word about {key}" for key in keys if key not in said]
    faults += [
        f"{entry.key} dropped without a reason" for entry in entries if entry.action == "dropped" and not entry.why
    ]
    faults += [f"{entry.key} has no rule" for entry in entries if entry.action == "unknown"]
    if again.text != found.text:
        faults.append("a second migration changes it")
    return found.report, "; ".join(faults)


def markdown(rows: list[tuple[str, MigrationReport, str]]) -> str:
    """The file in docs/results."""
    names = (*ACTIONS, *LEVELS)
    lines = [
        "# Migrated configurations",
        "",
        f"`python tools/migrate.py`, {date.today().isoformat()}, Python {platform.python_version()}.",
        "Every YAML file of NeMo v2.4.0 (`examples/nlp/language_modeling/conf` and `tuning/conf`), of NxD",
        "Training (`examples/conf`) and of NNM (NeMo's folders), with `--from auto` and nothing else. Numbers are",
        "of keys, `derived` are those that were added or worked out. A question, a warning or an error is of a key",
        "or of the result; they are listed below. Fault: a key without a word, dropped without a reason, or a",
        "second migration that changes something. The rules: [../migrate_keys.md](../migrate_keys.md).",
        "",
        f"| repository | configuration | dialect | {' | '.join(names)} | fault |",
        f"|---|---|---|{'---|' * (len(names) + 1)}",
    ]
    for repository, report, fault in rows:
        counts = report.counts()
        numbers = " | ".join(str(counts[name]) for name in names)
        lines.append(f"| {repository} | {report.place} | {report.dialect} | {numbers} | {fault or '-'} |")
    lines += ["", "## Questions, warnings and errors", ""]
    said: Counter[str] = Counter()
    where: dict[str, list[str]] = {}
    for repository, report, _ in rows:
        for entry in report.entries:
            if entry.level:
                text = f"{entry.level}: `{entry.key or entry.to}`: {entry.why}"
                said[text] += 1
                where.setdefault(text, []).append(f"{repository}/{report.place}")
        for level, text in report.findings:
            said[f"{level} of the result: {text}"] += 1
            where.setdefault(f"{level} of the result: {text}", []).append(f"{repository}/{report.place}")
    lines += ["| files | what | first of them |", "|---|---|---|"]
    for text, number in sorted(said.items(), key=lambda item: (item[0].split(":")[0], -item[1], item[0])):
        lines.append(f"| {number} | {text.replace('|', chr(92) + '|')} | {where[text][0]} |")
    lines += ["", "## Dropped keys", "", "| files | key | because |", "|---|---|---|"]
    dropped: Counter[tuple[str, str]] = Counter()
    for _, report, _ in rows:
        dropped.update((entry.key, entry.why) for entry in report.entries if entry.action == "dropped")
    for (key, why), number in sorted(dropped.items()):
        lines.append(f"| {number} | `{key}` | {why} |")
    return "\n".join(lines) + "\n"


def write_keys() -> int:
    """Each dialect's keys with their values, as facts for the tests: no text of upstream's files."""
    KEYS.mkdir(parents=True, exist_ok=True)
    for dialect in CHECKOUTS:
        files: dict[str, Any] = {}
        for file in config_files(dialect):
            nodes = Document(file.read_text(encoding="utf-8")).nodes()
            keys = sorted(node.path for node in nodes if not node.is_section)
            files[str(file.relative_to(os.environ[CHECKOUTS[dialect][0]]))] = keys
        union = sorted({key for keys in files.values() for key in keys})
        index = {key: at for at, key in enumerate(union)}
        made = {"keys": union, "files": {name: [index[key] for key in keys] for name, keys in files.items()}}
        text = json.dumps(made, separators=(",", ":")).replace('"],"files"', '"],\n"files"').replace('],"', '],\n"')
        (KEYS / f"{dialect}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{dialect}: {len(files)} files, {len(union)} keys")
    return 0


if __name__ == "__main__":
    sys.exit(main())
