"""The report as a table, as Markdown and as JSON."""

from __future__ import annotations

import json

from nxdt_nemo.config.migrate.report import Entry, MigrationReport

REPORT = MigrationReport(
    "x.yaml",
    "nnm",
    entries=[
        Entry("name", "kept", "name", "a", "a"),
        Entry("seed", "moved", "model.seed", 1, 1, "NeMo's place"),
        Entry("model.sharp", "dropped", "", True, None, "of NCCL | gone"),
        Entry("trainer.precision", "mapped", "trainer.precision", 16, "bf16", "no fp16", "warning"),
        Entry("", "derived", "model.mcore_gpt", None, True, "megatron-core"),
    ],
    findings=[("error", "TP does not divide")],
)


def test_table():
    assert REPORT.render().splitlines() == [
        "what             key                value       because",
        "moved            seed               1           NeMo's place",
        "                 -> model.seed",
        "dropped          model.sharp        True        of NCCL | gone",
        "mapped, warning  trainer.precision  16 -> bf16  no fp16",
        "derived          + model.mcore_gpt  True        megatron-core",
        "",
        "kept as they are: name",
        "",
        "error: TP does not divide",
        "x.yaml: nnm -> nemo 2.4: 1 kept, 1 moved, 1 mapped, 1 derived, 1 dropped, 1 warning, 1 error",
    ]


def test_markdown():
    lines = REPORT.as_markdown().splitlines()
    assert "| moved | `seed` → `model.seed` | `1` | NeMo's place |" in lines
    assert "| dropped | `model.sharp` | `True` | of NCCL \\| gone |" in lines
    assert "- error: TP does not divide" in lines
    assert "Kept as they are: `name`." in lines


def test_json():
    found = json.loads(json.dumps(REPORT.as_json()))
    assert found["counts"]["kept"] == 1
    assert found["keys"][2] == {
        "key": "model.sharp",
        "action": "dropped",
        "to": "",
        "old": True,
        "new": None,
        "why": "of NCCL | gone",
        "level": "",
    }
    assert REPORT.errors == ["TP does not divide"]
