"""This package itself: version and commit, the start-up file, the patch records.

Room audit/. Uses patching/. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nxdt_nemo._resources import folder
from nxdt_nemo.audit.doctor.row import Row, output_of
from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.records import load
from nxdt_nemo.patching.verify import verify

__all__ = ["PTH", "rows"]

PTH = "nxdt_nemo_activate.pth"
SECTION = "backend"


def rows(version: str) -> Iterator[Row]:
    """The rows of this section; version is this package's own."""
    try:
        found = distribution("nxdt-nemo")
    except PackageNotFoundError:
        fix = "pip install it: on PYTHONPATH alone there is no command and no tested versions"
        yield Row(SECTION, "nxdt-nemo", f"{version}, not installed", "note", fix)
    else:
        yield Row(SECTION, "nxdt-nemo", f"{found.version}{_source(found)}")
        yield _start_up_file()
    yield _patches()


def _source(found: Distribution) -> str:
    """`, editable at COMMIT` for a checkout; "" for a wheel."""
    written = json.loads(found.read_text("direct_url.json") or "{}")
    if not written.get("dir_info", {}).get("editable"):
        return ""
    checkout = unquote(urlsplit(written["url"]).path)
    commit = output_of(["git", "-C", checkout, "rev-parse", "--short", "HEAD"])
    if commit is None:
        return ", editable"
    changed = output_of(["git", "-C", checkout, "status", "--porcelain"])
    return f", editable at {commit}{' with changes' if changed else ''}"


def _start_up_file() -> Row:
    folders = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    if any((place / PTH).is_file() for place in folders):
        return Row(SECTION, PTH, "in site-packages")
    fix = "install nxdt-nemo again; `nxdt-nemo run` works without"
    return Row(SECTION, PTH, "missing: NXDT_NEMO=1 has no effect", "problem", fix)


def _patches() -> Row:
    what = "patch records"
    try:
        found = verify(load(folder("patches")), with_live=False)
    except PatchError as error:
        return Row(SECTION, what, str(error), "problem", "install nxdt-nemo again")
    drifted = [f"{row.id} ({row.static.why})" for row in found if not row.ok]
    if drifted:
        text = f"{len(drifted)} of {len(found)} do not fit: {'; '.join(drifted)}"
        return Row(SECTION, what, text, "problem", "install the tested versions")
    return Row(SECTION, what, f"{len(found)} of {len(found)} fit what is installed (static)")
