"""Where patches/ and configs/ are; shared by all rooms, imports nothing heavy.

They stand at the top of the repository and travel in the wheel as package data. An editable install reads
the repository's, so that an edit counts at once. Proof: tests/packaging/test_install.py.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from nxdt_nemo.errors import NxdtError

__all__ = ["folder"]

_REPOSITORY = Path(__file__).resolve().parent.parent


def folder(name: Literal["patches", "configs"]) -> Path:
    """The folder of that name: the repository's when it is beside the package, else the wheel's.

    Raises NxdtError when neither is there, which means a broken installation.
    """
    beside = _REPOSITORY / name
    if beside.is_dir() and (_REPOSITORY / "pyproject.toml").is_file():
        return beside
    packaged = Path(str(files("nxdt_nemo") / f"_{name}"))
    if not packaged.is_dir():
        raise NxdtError(f"{packaged} is missing: install nxdt-nemo again")
    return packaged
