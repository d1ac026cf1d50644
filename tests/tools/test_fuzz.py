"""A fast part of tools/fuzz.py, and that it can fail."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def fuzz(load_tool):
    return load_tool("fuzz")


def test_no_mistake_is_accepted(fuzz):
    some = fuzz.CONFIGS[3:4] + fuzz.CONFIGS[9:]
    configs = {str(job): fuzz.plain(fuzz.read(Path("train"), job.overrides)) for job in some}
    rows = fuzz.fuzz(configs, 60, seed=7)
    assert {kind: (row.silent, row.raised) for kind, row in rows.items()} == {kind: ([], []) for kind in fuzz.KINDS}
    assert all(row.made == 12 for row in rows.values())
    assert rows["typo"].suggested >= 11


def test_the_tool_sees_a_check_that_sees_nothing(fuzz, monkeypatch):
    configs = {"one": fuzz.plain(fuzz.read(Path("train"), fuzz.CONFIGS[0].overrides))}
    sound = fuzz.validate_config(fuzz.OmegaConf.create(configs["one"]), strict=True)
    monkeypatch.setattr(fuzz, "validate_config", lambda *_, **__: sound)
    rows = fuzz.fuzz(configs, 20, seed=1)
    assert not fuzz.good(rows)
    assert len(rows["wrong type"].silent) == rows["wrong type"].made


def test_a_misspelling_is_one_slip():
    sys.path.insert(0, str(TOOLS))
    try:
        from fuzz_lib.mutations import misspelt
    finally:
        sys.path.remove(str(TOOLS))
    draw = random.Random(0)
    for _ in range(50):
        assert abs(len(misspelt("num_layers", draw)) - len("num_layers")) <= 1
