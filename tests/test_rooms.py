"""Each room imports alone, and loads none above it: names in strings escape import-linter."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nxdt_nemo

PACKAGE = Path(nxdt_nemo.__file__).parent
ORDER = ["testing", "cli", "audit", "nemo", "lightning", "megatron", "apex", "runtime"]
LEAVES = ["patching", "config", "checkpoint", "data"]
UPSTREAM = {"torch", "lightning", "pytorch_lightning", "nemo", "megatron", "hydra", "transformers", "torch_xla"}

# Imports a room and every module in it, and prints what that loaded. The stand-in for torch_neuronx is material: it is
# copied to where it can be imported, beside its compiled half.
PROBE = """
import importlib, json, pkgutil, sys
room = importlib.import_module(sys.argv[1])
if sys.argv[2] == "whole":
    for found in pkgutil.walk_packages(getattr(room, "__path__", []), room.__name__ + "."):
        if not found.name.endswith("__main__") and ".torch_neuronx" not in found.name:
            importlib.import_module(found.name)
ours = {name.split(".")[1] for name in sys.modules if name.startswith("nxdt_nemo.")}
print("PROBE" + json.dumps([sorted(ours), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def loaded_by(room: str, *, whole: bool = True, root: Path = PACKAGE.parent) -> tuple[set[str], set[str]]:
    """(our rooms, top-level packages) in a fresh process that imported nxdt_nemo.<room>."""
    name = f"nxdt_nemo.{room}" if room else "nxdt_nemo"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NXDT_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, name, "whole" if whole else "top"],
        env={**environment, "PYTHONPATH": str(root)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ours, packages = json.loads(done.stdout.rpartition("PROBE")[2])
    return set(ours), set(packages)


def not_allowed(room: str) -> set[str]:
    """The rooms that `room` may not load."""
    if room in LEAVES:
        return {*ORDER, *LEAVES} - {room}
    return set(ORDER[: ORDER.index(room)])


def test_every_folder_is_a_room_of_the_picture() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*ORDER, *LEAVES}


@pytest.mark.parametrize("room", [*ORDER, *LEAVES])
def test_a_room_loads_no_room_above_it(room: str) -> None:
    ours, _ = loaded_by(room)
    assert ours & not_allowed(room) == set()


@pytest.mark.parametrize("room", ["config", "patching", "cli"])
def test_a_base_room_is_light(room: str) -> None:
    _, packages = loaded_by(room)
    assert packages & UPSTREAM == set()


@pytest.mark.parametrize("room", ["", "runtime", "testing"])
def test_the_top_of_the_package_and_of_the_rest_is_light(room: str) -> None:
    _, packages = loaded_by(room, whole=False)
    assert packages & UPSTREAM == set()


@pytest.mark.parametrize(
    ("room", "line", "loads"),
    [
        ("runtime", '__import__("nxdt_nemo." + "megatron")', "megatron"),
        ("data", "from nxdt_nemo import checkpoint", "checkpoint"),
        ("patching", "import torch", "torch"),
    ],
)
def test_the_checks_above_can_fail(room: str, line: str, loads: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "nxdt_nemo", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "nxdt_nemo" / room / "__init__.py").open("a") as file:
        file.write(f"\n{line}\n")
    ours, packages = loaded_by(room, whole=False, root=tmp_path)
    assert loads in (ours & not_allowed(room)) | (packages & UPSTREAM)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_docstring_names_tests_that_are_there(file: Path) -> None:
    root = PACKAGE.parent
    if not (root / "tests").is_dir():
        pytest.skip("no tests beside the package")
    named = re.findall(r"\btests/[\w/]+\.py", ast.get_docstring(ast.parse(file.read_text())) or "")
    assert [name for name in named if not (root / name).is_file()] == []
