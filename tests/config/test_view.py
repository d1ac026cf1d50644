"""What a rule sees of a config: absent, null, `???` and unresolvable values read alike."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config.view import View

CFG = OmegaConf.create(
    {
        "trainer": {"devices": "8", "nodes": 2.0, "flag": True, "word": "two"},
        "model": {
            "seq": 64,
            "copy": "${.seq}",
            "absent": None,
            "missing": "???",
            "lost": "${no.such.key}",
            "foreign": "${no_such_resolver:1}",
            "list": ["${model.seq}", 2],
            "data": {"seq": "${model.seq}"},
        },
    }
)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.seq", 64),
        ("model.copy", 64),
        ("model.data.seq", 64),
        ("model.list", [64, 2]),
        ("model.absent", "default"),
        ("model.missing", "default"),
        ("model.lost", "default"),
        ("model.foreign", "default"),
        ("model.nowhere", "default"),
        ("nowhere.at.all", "default"),
    ],
)
def test_get(path, value):
    assert View(CFG).get(path, "default") == value


def test_has_tells_written_from_absent():
    view = View(CFG)
    assert [view.has(f"model.{key}") for key in ("absent", "missing", "lost", "nowhere")] == [True, True, True, False]
    assert view.raw("model.missing") == "???"


def test_numbers():
    view = View(CFG)
    assert view.number("trainer.devices") == 8
    assert [view.number(f"trainer.{key}") for key in ("flag", "word", "absent")] == [None, None, None]
    assert [view.size(f"trainer.{key}") for key in ("devices", "word", "absent")] == [8, 1, 1]


def test_interpolations_are_remembered():
    assert "model.copy" in View(CFG).interpolated
    assert "model.seq" not in View(CFG).interpolated


def test_a_section_keeps_its_path_and_resolves_into_the_whole():
    view = View(CFG.model, section="model")
    assert view.get("model.data.seq") == 64
    assert view.has("model")
    assert view.local("model.data.seq") == "data.seq"
