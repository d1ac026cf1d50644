"""NVIDIA's tests, and the packages that they import beyond the stack.

pip downloads with the index that this machine has configured, and checks the hashes of a requirements file. Of NeMo:
only tests/ and pyproject.toml (pytest's settings) of the sdist of nemo_toolkit are unpacked. Of Megatron-LM, which has
no sdist with tests: the files of one commit, by `git archive`, without megatron/core. Either way the tests import what
is installed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

__all__ = ["BUILD", "MegatronSources", "Packages", "Sources"]

BUILD = Path(__file__).parents[2] / "build" / "upstream"
HERE = Path(__file__).parent


class Packages:
    """What pip downloaded for one requirements file: `folder` goes on the import path."""

    def __init__(self, requirements: Path, build: Path) -> None:
        self.folder = build / "packages"
        self.downloads = build / "downloads"
        self._requirements, self._stamp = requirements, build / "fetched.txt"

    def fetch(self) -> None:
        """Download what is pinned, unless it is there. Raises SystemExit, one line, if pip cannot."""
        pinned = self._requirements.read_text(encoding="utf-8")
        if self._stamp.exists() and self._stamp.read_text(encoding="utf-8") == pinned:
            return
        self._stamp.unlink(missing_ok=True)
        shutil.rmtree(self.downloads, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        # --no-build-isolation: pip asks the sdist for its metadata, and our setuptools can answer.
        where = ("-r", str(self._requirements), "--dest", str(self.downloads))
        _pip("download", "--no-deps", "--no-build-isolation", "--no-binary", "nemo_toolkit", *where)
        wheels = [str(path) for path in self.downloads.glob("*.whl")]
        _pip("install", "--no-deps", "--no-index", "--target", str(self.folder), *wheels)
        self._stamp.write_text(pinned, encoding="utf-8")


class Sources:
    """NeMo's tests: the sdist, and a folder of packages for both sides' import path."""

    def __init__(self) -> None:
        self._packages = Packages(HERE / "requirements.txt", BUILD)
        self.packages = self._packages.folder

    def fetch(self) -> None:
        """See Packages.fetch."""
        self._packages.fetch()

    def unpack(self, folder: Path) -> None:
        """A fresh copy of the tests in `folder`; their runs leave files, and their fixtures ask that there be none."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sdist = next(self._packages.downloads.glob("nemo_toolkit-*.tar.gz"))
        with tarfile.open(sdist) as archive:
            for member in archive:
                _, _, member.name = member.name.partition("/")
                if member.name == "pyproject.toml" or member.name.startswith("tests/"):
                    archive.extract(member, folder, filter="data")
        data = folder / "tests" / ".data"
        data.mkdir()
        tarfile.open(data / "test_data.tar.gz", "w:gz").close()  # upstream's is on the network; --use_local_test_data


class MegatronSources:
    """Megatron-LM's tests and what they import from beside megatron.core, as of one commit."""

    URL, TAG = "https://github.com/NVIDIA/Megatron-LM", "core_v0.13.1"
    COMMIT = "ea651a3b78b9b0c1dfd83975ff28853e38e5abaa"
    # No megatron/core: megatron is a namespace package, whose part of that name is the installed wheel.
    PATHS = ("megatron/inference", "megatron/legacy", "megatron/post_training", "megatron/training", "pyproject.toml")
    PATHS += ("pretrain_bert.py", "pretrain_gpt.py", "pretrain_mamba.py", "pretrain_t5.py", "tests", "tools")

    def __init__(self, build: Path, checkout: Path | None = None) -> None:
        """`checkout` is a repository that has the commit, bare or not; by default the tag is cloned."""
        self._packages = Packages(HERE / "requirements_megatron.txt", build)
        self.packages, self.folder = self._packages.folder, build / "megatron-lm"
        self._clone, self._checkout = build / "clone", checkout

    def fetch(self) -> None:
        """Packages and files, unless they are there. Raises SystemExit, one line, if pip or git cannot."""
        self._packages.fetch()
        stamp = self.folder / "commit.txt"
        if stamp.exists() and stamp.read_text(encoding="utf-8") == self.COMMIT:
            return
        checkout = self._checkout or self._cloned()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        archive = self.folder.with_suffix(".tar")
        _git(checkout, "archive", f"--output={archive}", self.COMMIT, *self.PATHS)
        with tarfile.open(archive) as files:
            files.extractall(self.folder, filter="data")
        archive.unlink()
        stamp.write_text(self.COMMIT, encoding="utf-8")

    def _cloned(self) -> Path:
        if not self._clone.exists():
            _git(Path.cwd(), "clone", "--quiet", "--depth=1", "--branch", self.TAG, self.URL, str(self._clone))
        return self._clone


def _git(repository: Path, *args: str) -> None:
    command = ["git", "-c", "advice.detachedHead=false", "-C", str(repository), *args]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"test-megatron: git {args[0]} in {repository}: {found.stderr.strip().splitlines()[-1]}")


def _pip(*args: str) -> None:
    if importlib.util.find_spec("pip") is None:  # uv makes environments without
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    found = subprocess.run([sys.executable, "-m", "pip", *args, "--quiet"], capture_output=True, text=True, check=False)
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(f"upstream tests: pip {args[0]}: {' '.join(lines) or found.stderr.strip()}")
