"""Where a target is on disk, and which edits change its fingerprint."""

from __future__ import annotations

import hashlib
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.fingerprint import Source, locate, source_of

if TYPE_CHECKING:
    from conftest import Upstream

CODE = '''
import os
from elsewhere import borrowed

LIMIT = 3

@os.register
def run(a, b=1):
    """Say."""
    return a + b  # sum

class Outer:
    """Text."""
    size: int = 4
    """Text on size."""

    class Inner:
        def step(self):
            return 1

    @property
    def width(self):
        return 1

    @width.setter
    def width(self, value):
        self._w = value

try:
    from fast import kernel
    HAVE = True
except ImportError:
    HAVE = False
    kernel = None

if HAVE:
    def pick(): return "fast"
else:
    def pick(): return "slow"

first, (second, *rest) = 1, (2, 3)
Outer.size = 5
'''


def source(folder: Path, code: str = CODE) -> Source:
    file = folder / "module.py"
    file.write_text(textwrap.dedent(code))
    return Source(file)


def change(folder: Path, old: str, new: str) -> Source:
    assert CODE.count(old) >= 1
    return source(folder, CODE.replace(old, new))


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("run", "# sum", "# the sum of both"),
        ("run", '"""Say."""', '"""Say more."""'),
        ("run", '    """Say."""\n', ""),
        ("run", "return a + b", "return (a\n            + b)"),
        ("run", "LIMIT = 3", "LIMIT = 4"),
        ("Outer", '    """Text on size."""\n', ""),
        ("Outer.Inner.step", "size: int = 4", "size: int = 5"),
        ("Outer", "Outer.size = 5", "Outer.size = 6"),
        ("HAVE", 'return "fast"', 'return "faster"'),
    ],
)
def test_layout_texts_and_other_code_do_not_count(tmp_path: Path, target: str, old: str, new: str) -> None:
    before = source(tmp_path).fingerprint(target.split("."))
    assert change(tmp_path, old, new).fingerprint(target.split(".")) == before


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("run", "a + b", "a - b"),
        ("run", "b=1", "b=2"),
        ("run", "@os.register\n", ""),
        ("Outer", "size: int = 4", "size: int = 5"),
        ("Outer.Inner.step", "return 1", "return 2"),
        ("Outer.width", "self._w = value", "self._w = -value"),  # the setter is part of a property
        ("LIMIT", "LIMIT = 3", "LIMIT = 4"),
        ("HAVE", "HAVE = True", "HAVE = 1"),
        ("HAVE", "HAVE = False", "HAVE = 0"),
        ("pick", '"fast"', '"faster"'),
        ("pick", '"slow"', '"slower"'),
        ("kernel", "kernel = None", "kernel = 0"),
        ("kernel", "from fast import", "from faster import"),
        ("second", "1, (2, 3)", "1, (2, 4)"),
    ],
)
def test_code_of_every_definition_counts(tmp_path: Path, target: str, old: str, new: str) -> None:
    before = source(tmp_path).fingerprint(target.split("."))
    assert change(tmp_path, old, new).fingerprint(target.split(".")) != before


def test_a_fingerprint_does_not_depend_on_what_was_asked_before(tmp_path: Path) -> None:
    fresh = source(tmp_path).fingerprint(["Outer"])
    asked = source(tmp_path)
    asked.fingerprint(["Outer", "Inner", "step"])
    assert asked.fingerprint(["Outer"]) == asked.fingerprint(["Outer"]) == fresh


def test_it_is_the_digest_of_the_printed_statements(tmp_path: Path) -> None:
    expected = hashlib.sha256(b"HAVE = True\nHAVE = False").hexdigest()
    assert source(tmp_path).fingerprint(["HAVE"]) == f"sha256:{expected}"


@pytest.mark.parametrize("name", ["absent", "Outer.absent", "Outer.run", "run.inner", "borrowed", "os"])
def test_a_name_that_is_not_defined_here_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PatchError, match=rf"{name} is not defined in .*module\.py"):
        source(tmp_path).fingerprint(name.split("."))


def test_a_borrowed_name_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="only imported; name the module that defines it"):
        source(tmp_path).fingerprint(["borrowed"])
    assert len(source(tmp_path).definitions(["borrowed"], imported=True)) == 1


def test_lines_include_decorators_and_come_in_source_order(tmp_path: Path) -> None:
    text = CODE.splitlines()
    found = source(tmp_path)
    ((first, last),) = found.lines(["run"])
    assert (text[first - 1], text[last - 1]) == ("@os.register", "    return a + b  # sum")
    assert [text[first - 1].strip() for first, _ in found.lines(["HAVE"])] == ["HAVE = True", "HAVE = False"]


def test_a_name_is_split_at_its_module_without_importing(upstream: Upstream) -> None:
    upstream.write("fakeup.deep.", "raise RuntimeError('imported')")
    file = upstream.write("fakeup.deep.module", "raise RuntimeError('imported')")
    place = locate("fakeup.deep.module.Class.method")
    assert place is not None
    assert (place.module, place.attribute, place.file) == ("fakeup.deep.module", ("Class", "method"), file)
    gone = locate("fakeup.deep.gone.name")
    assert gone is not None
    assert (gone.module, gone.attribute, gone.package) == ("fakeup.deep", ("gone", "name"), True)
    assert locate("nosuchpackage.name") is None


def test_roots_stand_in_for_the_environment(upstream: Upstream, tmp_path: Path) -> None:
    upstream.write("fakeup.module", "x = 1")
    (tmp_path / "next/fakeup").mkdir(parents=True)
    (tmp_path / "next/fakeup/module.py").write_text("x = 2")  # a namespace package, as megatron is
    here, there = locate("fakeup.module.x"), locate("fakeup.module.x", [str(tmp_path / "next")])
    assert here is not None
    assert there is not None
    assert (here.file, there.file) == (upstream.root / "fakeup/module.py", tmp_path / "next/fakeup/module.py")
    assert locate("fakeup.module.x", [str(tmp_path)]) is None


def test_the_source_is_the_file_really_imported(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.write("fakeup.module", "x = 1")
    (tmp_path / "checkout/fakeup").mkdir(parents=True)
    (tmp_path / "checkout/fakeup/__init__.py").touch()
    (tmp_path / "checkout/fakeup/module.py").write_text("x = 2")
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    module = upstream.load("fakeup.module")
    assert source_of(module).file == tmp_path / "checkout/fakeup/module.py"
    assert module.x == 2


def test_a_compiled_module_has_no_source() -> None:
    with pytest.raises(PatchError, match=r"sys was imported from .*, which is not Python source"):
        source_of(sys)
