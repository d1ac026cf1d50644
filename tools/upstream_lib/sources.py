"""NVIDIA's tests, unpacked from the sdist of nemo_toolkit on the package registry.

pip downloads with the index that this machine has configured, and checks the hashes of requirements.txt. Only tests/
and pyproject.toml (pytest's settings) are unpacked, so that the tests import the installed nemo and not the sdist's.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

__all__ = ["BUILD", "Sources"]

BUILD = Path(__file__).parents[2] / "build" / "upstream"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class Sources:
    """What was downloaded: the sdist, and a folder of packages for both sides' import path."""

    def __init__(self) -> None:
        self.packages = BUILD / "packages"
        self._downloads = BUILD / "downloads"

    def fetch(self) -> None:
        """Download what REQUIREMENTS pins, unless it is there. Raises SystemExit, one line, if pip cannot."""
        pinned, stamp = REQUIREMENTS.read_text(encoding="utf-8"), BUILD / "fetched.txt"
        if stamp.exists() and stamp.read_text(encoding="utf-8") == pinned:
            return
        stamp.unlink(missing_ok=True)
        shutil.rmtree(self._downloads, ignore_errors=True)
        shutil.rmtree(self.packages, ignore_errors=True)
        # --no-build-isolation: pip asks the sdist for its metadata, and our setuptools can answer.
        where = ("-r", str(REQUIREMENTS), "--dest", str(self._downloads))
        _pip("download", "--no-deps", "--no-build-isolation", "--no-binary", "nemo_toolkit", *where)
        wheels = [str(path) for path in self._downloads.glob("*.whl")]
        _pip("install", "--no-deps", "--no-index", "--target", str(self.packages), *wheels)
        stamp.write_text(pinned, encoding="utf-8")

    def unpack(self, folder: Path) -> None:
        """A fresh copy of the tests in `folder`; their runs leave files, and their fixtures ask that there be none."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sdist = next(self._downloads.glob("nemo_toolkit-*.tar.gz"))
        with tarfile.open(sdist) as archive:
            for member in archive:
                _, _, member.name = member.name.partition("/")
                if member.name == "pyproject.toml" or member.name.startswith("tests/"):
                    archive.extract(member, folder, filter="data")
        data = folder / "tests" / ".data"
        data.mkdir()
        tarfile.open(data / "test_data.tar.gz", "w:gz").close()  # upstream's is on the network; --use_local_test_data


def _pip(*args: str) -> None:
    if importlib.util.find_spec("pip") is None:  # uv makes environments without
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    found = subprocess.run([sys.executable, "-m", "pip", *args, "--quiet"], capture_output=True, text=True, check=False)
    if found.returncode:
        lines = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(f"test-upstream: pip {args[0]}: {' '.join(lines) or found.stderr.strip()}")
