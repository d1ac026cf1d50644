"""Where commands write: a folder that takes files, no text over another one unasked, and the cells of a table.

Room cli/. Proof: tests/cli/test_doctor_target.py, tests/cli/test_migrate.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nxdt_nemo.errors import UserError

__all__ = ["cell", "into", "write"]


def cell(text: str) -> str:
    """One line without what Markdown would take for the end of a cell, or for emphasis."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def into(folder: Path, option: str) -> Path:
    """The folder, made if it is not there. Raises UserError naming the option that gave it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "name a folder to write into"
        raise UserError(error.strerror or str(error), place=f"{option} {folder}", fix=fix) from None
    return folder


def write(texts: Mapping[Path, str], *, force: bool) -> None:
    """Write each text to its file, all or none. Raises UserError for a file with another text, unless `force`."""
    for file, text in texts.items():
        if file.exists() and not force and not _holds(file, text):
            raise UserError("is there already", place=f"-o {file}", fix="use --force to write over it")
    for file, text in texts.items():
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", place=f"-o {file}") from None


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()
