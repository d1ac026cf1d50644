"""NNM's train_setup.sh: the precision that its YAML files do not say.

Room config/ (leaf). Imports the standard library. Proof: tests/config/migrate/test_train_setup.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from nxdt_nemo.config.migrate.derive import TRAINING_PRECISIONS
from nxdt_nemo.config.report import or_list
from nxdt_nemo.errors import UserError

__all__ = ["training_precision"]

ASSIGNED = re.compile(r"""^\s*(?:export\s+)?training_precision=["']?([\w.]+)["']?\s*(?:#.*)?$""", re.MULTILINE)


def training_precision(file: Path) -> str:
    """The last value that the script gives training_precision.

    Raises UserError when the file is not there, does not set it, or sets it to something that NNM does not know.
    """
    place = f"--train-setup {file}"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", place=place) from None
    found = ASSIGNED.findall(text)
    if not found:
        raise UserError("sets no training_precision", place=place, fix="name NNM's train_setup.sh")
    if found[-1] not in TRAINING_PRECISIONS:
        fix = f"use {or_list(TRAINING_PRECISIONS)}"
        raise UserError(f"training_precision={found[-1]} is not known", place=place, fix=fix)
    return str(found[-1])
