"""All configurations of the three repositories, from checkouts that environment variables name."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config.migrate import migrate
from nxdt_nemo.config.migrate.tree import Document
from nxdt_nemo.testing.migrated import CHECKOUTS, config_files

pytestmark = [pytest.mark.upstream, pytest.mark.slow]
NUMBERS = {"nemo": 68, "nxdt": 22, "nnm": 40}


@pytest.mark.parametrize("repository", CHECKOUTS)
def test_every_configuration_migrates(repository):
    files = config_files(repository)
    if not files:
        pytest.skip(f"{CHECKOUTS[repository][0]} names no checkout")
    assert len(files) == NUMBERS[repository]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert Document(text).render() == text, file.name
        found = migrate(text, place=file.name)
        assert migrate(found.text).text == found.text, file.name
        OmegaConf.create(found.text)
        keys = {node.path for node in Document(text).nodes() if not node.is_section}
        entries = found.report.entries
        assert keys == {entry.key for entry in entries if entry.key}, file.name
        assert [entry.key for entry in entries if entry.action == "dropped" and not entry.why] == []
        assert [entry.key for entry in entries if entry.action == "unknown"] == []
