"""An upstream written to order: packages, versions and records in a temporary folder on sys.path."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nxdt_nemo.patching import patcher as patcher_module
from nxdt_nemo.patching.fingerprint import Source, locate
from nxdt_nemo.patching.patcher import Patcher
from nxdt_nemo.patching.records import LANES, Kind, Record

TOP = "fakeup"


class Upstream:
    """Writes modules below `root`, which is on sys.path, and makes records for what is in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.release("fakeup-dist", "1.2.0")

    def write(self, module: str, code: str) -> Path:
        """Write `a.b` to a/b.py, or `a.b.` to a/b/__init__.py; packages above are made."""
        *above, name = module.removesuffix(".").split(".")
        folder = self.root
        for part in above:
            folder = folder / part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        file = folder / f"{name}.py"
        if module.endswith("."):
            file = folder / name / "__init__.py"
            file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(code))
        importlib.invalidate_caches()
        return file

    def release(self, distribution: str, version: str) -> None:
        """Make the distribution look installed in this version, and in no other."""
        folder = self.root / f"{distribution.replace('-', '_')}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        importlib.invalidate_caches()
        patcher_module._installed_version.cache_clear()

    def record(
        self,
        target: str,
        replacement: str = "",
        kind: Kind = "replace",
        *,
        name: str = "one",
        versions: str = "fakeup-dist>=1.2,<1.3",
        fingerprint: str | None = None,
        lanes: tuple[str, ...] = LANES,
        order: int | None = None,
    ) -> Record:
        """A record whose fingerprint, unless given, is that of the source as it now is."""
        if fingerprint is None:
            fingerprint = self.fingerprint(target) if kind in ("replace", "wrap") else ""
        return Record(name, "fake.toml", target, kind, replacement, (versions,), fingerprint, "w", "r", lanes, order)

    def fingerprint(self, target: str) -> str:
        place = locate(target)
        assert place is not None
        assert place.file is not None
        return Source(place.file).fingerprint(place.attribute)

    def load(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    """An empty upstream on sys.path; its modules leave sys.modules afterwards."""
    before = set(sys.modules)
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    yield Upstream(root)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (TOP, "ours", "elsewhere"):
            del sys.modules[name]
    patcher_module._installed_version.cache_clear()


MakePatcher = Callable[..., Patcher]


@pytest.fixture
def patcher() -> Iterator[MakePatcher]:
    """Makes patchers that see the fake upstream as their scope, and undoes them."""
    made: list[Patcher] = []

    def make(*records: Record, lane: str = "cpu") -> Patcher:
        made.append(Patcher(records, lambda: lane, scope=frozenset({TOP, "__main__"})))
        return made[-1]

    yield make
    for one in reversed(made):
        one.undo()
