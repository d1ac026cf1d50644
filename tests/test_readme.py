"""What the README says of figures that move."""

from __future__ import annotations

import re
from pathlib import Path

from nxdt_nemo._resources import folder
from nxdt_nemo.patching.records import load

README = Path(__file__).resolve().parents[1] / "README.md"


def test_number_of_patches() -> None:
    said = re.search(r"We touch upstream in (\d+) places", README.read_text())
    assert said is not None
    assert int(said[1]) == len(load(folder("patches")))


def test_files_that_it_names_exist() -> None:
    text = README.read_text()
    named = re.findall(r"\]\(([\w./]+)\)", text) + re.findall(r"`((?:nxdt_nemo|patches|tools)/[\w/.]+)`", text)
    assert len(named) > 10
    missing = [name for name in named if not (README.parent / name).exists()]
    assert not missing
