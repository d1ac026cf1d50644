"""docs/migrate_keys.md is the table's."""

from __future__ import annotations

from pathlib import Path

from nxdt_nemo.config.migrate.page import page
from nxdt_nemo.config.migrate.rules import table

PAGE = Path(__file__).parents[3] / "docs" / "migrate_keys.md"


def test_the_page_is_made_from_the_rules():
    assert PAGE.read_text() == page(), "python -m nxdt_nemo.config.migrate.page > docs/migrate_keys.md"


def test_every_rule_is_on_it():
    text = page()
    assert [rule.key[0] for rule in table() if f"`{rule.key[0]}`" not in text or rule.why not in text] == []
