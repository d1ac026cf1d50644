"""Configurations of NeMo 1.x and 2.x, NNM and NxD Training as NeMo 2.4 YAML that this backend runs.

Room config/ (leaf).

    tree      a YAML file as keys that keep their text
    rules     the table in configs/migrate/: what happens to each key, and why
    engine    migrate(): the table, the derivations, the report
    derive    what needs more than one key
    report    what happened to every key, as a table, JSON or Markdown
    launch    a launch script's lines as ours
    page      the documentation page of the table

Proof: tests/config/migrate/.
"""

from __future__ import annotations

from nxdt_nemo.config.migrate.engine import Options, Result, migrate
from nxdt_nemo.config.migrate.report import Entry, MigrationReport

__all__ = ["Entry", "MigrationReport", "Options", "Result", "migrate"]
