"""Environments that hold nxdt-nemo and its light base dependencies, made without a network.

The dependencies are linked from the environment that runs the tests: the closure of what the wheel's own
METADATA asks for, and nothing else, so a forgotten dependency is missing there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


def wanted(requirements: list[str]) -> list[Requirement]:
    """The requirements that hold here when no extra is asked for."""
    parsed = [Requirement(text) for text in requirements]
    return [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that these requirements need."""
    names: set[str] = set()
    waiting = wanted(requirements)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().name).lower()
        if name not in names:
            names.add(name)
            waiting += wanted(distribution(name).requires or [])
    return names


def link(names: set[str], site: Path) -> None:
    """Link what these distributions own at the top of site-packages."""
    for name in names:
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top in ("..", "__pycache__") or top.endswith(".pth") or (site / top).exists():
                continue
            (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))


def base_requirements(wheel: Path) -> list[str]:
    """What the wheel's METADATA asks for."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def environment(folder: Path, requirements: list[str], *install: str) -> Python:
    """A virtual environment with these requirements and `pip install *install`; returns what runs its programs."""
    venv.create(folder, with_pip=True, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    link(closure(requirements), folder / "lib" / version / "site-packages")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NXDT_", "PYTHON", "PIP_"))}

    def run(*arguments: str, program: str = "python", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(folder / "bin" / program), *arguments],
            cwd=folder,
            env={**inherited, "PYTHONDONTWRITEBYTECODE": "1", **more},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("-m", "pip", "--isolated", "install", "--quiet", "--no-index", "--no-deps", *install)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this working tree."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """An environment with the wheel."""
    return environment(tmp_path_factory.mktemp("wheel"), base_requirements(wheel), str(wheel))


@pytest.fixture(scope="session")
def editable(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """An environment with this working tree, `pip install -e`."""
    requirements = [*base_requirements(wheel), "hatchling", "editables"]
    folder = tmp_path_factory.mktemp("editable")
    return environment(folder, requirements, "--no-build-isolation", "--editable", str(ROOT))
