"""The room is light: what its import and a check load, seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "nemo", "megatron", "lightning", "pydantic", "hydra", "rich")
CHECK = """
from omegaconf import OmegaConf
from nxdt_nemo.config import check, sanitise
cfg = OmegaConf.create({"trainer": {"accelerator": "gpu"}, "model": {"sharp": True, "num_layer": 1}})
report = sanitise(cfg)
assert report.changes and report.unknown
"""


def loaded(code: str) -> set[str]:
    """Those of HEAVY that some code has loaded."""
    ask = f"\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + ask], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import nxdt_nemo.config", CHECK])
def test_neither_import_nor_check_loads_anything_heavy(code):
    assert loaded(code) == set()


def test_the_section_of_ours_loads_pydantic_only():
    assert loaded(CHECK.replace('"model":', '"neuron": {}, "model":')) == {"pydantic"}


def test_composing_loads_hydra_only(script):
    code = f"from pathlib import Path\nfrom nxdt_nemo.config import precheck\nprecheck(Path({str(script)!r}), [], {{}})"
    assert loaded(code) == {"hydra"}


def test_the_test_sees_a_heavy_import():
    assert loaded("import hydra") == {"hydra"}
