"""verify: drift is found without importing upstream, and live in another process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nxdt_nemo.patching.records import Record
from nxdt_nemo.patching.verify import Finding, incompatibility, live, static, verify

if TYPE_CHECKING:
    from conftest import Upstream

CODE = """
raise_when_static()

def run(a, b=1): return "upstream"

class Worker:
    def __init__(self, size): self.size = size

    def step(self, n): return n
"""

OURS = """
raise_when_static()

nothing = None

def run(a, b=1): return "ours"

def narrow(a): return "ours"

def around(original, /, *args, **kwargs): return original(*args, **kwargs)

class Worker:
    def __init__(self, size, colour=None): self.size = size
"""

BAD = "sha256:" + "0" * 64


@pytest.fixture
def written(upstream: Upstream) -> Upstream:
    upstream.write("fakeup.module", CODE)
    upstream.write("ours", OURS)
    upstream.write("broken", "def run(")
    return upstream


STATIC = [
    # target                    replacement      kind       changes                         why
    ("fakeup.module.run", "ours:run", "replace", {}, ""),
    ("fakeup.module.Worker.step", "ours:around", "wrap", {}, ""),
    ("fakeup.module.new", "ours:run", "define", {}, ""),
    ("fakeup.module.Worker.new", "ours:run", "define", {}, ""),
    ("fakeup.absent", "", "stub", {}, ""),
    ("fakeup.module.run", "ours:run", "replace", {"fingerprint": BAD}, "the source changed: sha256:000000000000..."),
    ("fakeup.module.gone", "ours:run", "replace", {"fingerprint": BAD}, "gone is not defined in"),
    ("fakeup.gone.run", "ours:run", "replace", {"fingerprint": BAD}, "gone.run is not defined in"),
    (
        "nosuch.gone.run",
        "ours:run",
        "replace",
        {"fingerprint": BAD},
        "nosuch.gone.run: no package nosuch in this environment",
    ),
    ("fakeup.module.run", "ours:gone", "replace", {}, "the replacement ours:gone is not written in"),
    ("fakeup.module.run", "broken:run", "replace", {}, "{root}/broken.py:1: '(' was never closed"),
    ("fakeup.module.run", "nosuch:run", "replace", {}, "the replacement's module nosuch does not exist"),
    ("fakeup.module.run", "ours:run", "define", {}, "fakeup.module.run exists upstream now"),
    ("fakeup.module", "ours", "define", {}, "fakeup.module exists upstream now"),
    ("fakeup.module.Gone.new", "ours:run", "define", {}, "fakeup.module has no class Gone"),
    ("fakeup.module.run", "ours:run", "replace", {"versions": "fakeup-dist<1"}, "fakeup-dist 1.2.0 is installed"),
]


@pytest.mark.parametrize(("target", "ours", "kind", "changes", "why"), STATIC)
def test_static(written: Upstream, target: str, ours: str, kind: Any, changes: dict[str, Any], why: str) -> None:
    """Both modules raise NameError when they are imported: what passes has not imported them."""
    finding = static(written.record(target, ours, kind, **changes))
    assert finding.ok is (not why)
    assert finding.why.startswith(why.format(root=written.root))


def test_the_next_release_is_looked_at_in_its_own_folder(written: Upstream, tmp_path: Path) -> None:
    after = type(written)(make_folder(tmp_path / "next"))
    after.write("fakeup.module", CODE.replace('"upstream"', '"changed"'))
    record = written.record("fakeup.module.run", "ours:run")
    after.release("fakeup-dist", "1.2.9")
    (row,) = verify([record], against=after.root)
    assert row.static.why.startswith("the source changed")
    assert row.live == Finding(None, "static only")
    assert not row.ok
    after.release("fakeup-dist", "1.3.0")
    (row,) = verify([record], against=after.root)
    assert row.static.why == "fakeup-dist 1.3.0 is installed; the record holds for fakeup-dist>=1.2,<1.3 only"
    (row,) = verify([record], with_live=False)
    assert row.ok


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


Live = Callable[..., dict[str, Finding]]


@pytest.fixture
def look(written: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Live:
    """live() in a process whose activation patches the fake upstream with the records `applied`."""
    written.write("fakeup.module", CODE.replace("raise_when_static()", ""))
    written.write("ours", OURS.replace("raise_when_static()", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(written.root), str(Path(__file__).parents[2])]))

    def look(*records: Record, applied: list[Record] | None = None) -> dict[str, Finding]:
        rows = [dataclasses.asdict(record) for record in (list(records) if applied is None else applied)]
        file = tmp_path / "activation.py"
        file.write_text(ACTIVATION.format(rows=rows))
        return live(records, activate=f"exec(open({str(file)!r}).read())")

    return look


# A hook as simple as can be: modules are patched when `import_module` has returned them.
ACTIVATION = """
import importlib, sys
from nxdt_nemo.patching import Patcher, Record

patcher = Patcher([Record(**row) for row in {rows!r}], lambda: "cpu")
original = importlib.import_module

def import_module(name, package=None):
    stub = patcher.stub_for(name)
    if stub is not None:
        return stub
    module = original(name, package)
    if name in patcher.modules():
        patcher.apply_to(module)
    return module

importlib.import_module = import_module
"""


def test_live_finds_what_is_in_place(written: Upstream, look: Live) -> None:
    records = [
        written.record("fakeup.module.run", "ours:run", name="base", order=1),
        written.record("fakeup.module.run", "ours:around", "wrap", name="around", order=2),
        written.record("fakeup.module.Worker", "ours:Worker", name="class"),
        written.record("fakeup.module.new", "ours:run", "define", name="new"),
        written.record("fakeup.module.none", "ours:nothing", "define", name="none"),
        written.record("fakeup.absent", kind="stub", name="module-stub"),
        written.record("fakeup.module.gone", kind="stub", name="stub"),
        written.record("fakeup.module.later", "ours:run", "define", name="other-lane", lanes=("neuron",)),
    ]
    findings = look(*records)
    assert findings.pop("other-lane") == Finding(None, "not on lane cpu")
    assert findings == {record.id: Finding(True) for record in records[:-1]}


def test_live_finds_what_is_not_in_place(written: Upstream, look: Live) -> None:
    record = written.record("fakeup.module.run", "ours:run")
    stub = written.record("fakeup.module.Worker", kind="stub", name="stub")
    findings = look(record, stub, applied=[])
    assert findings["one"].ok is False
    assert "<function run at" in findings["one"].why
    assert findings["one"].why.endswith("is there, not ours:run")
    assert findings["stub"] == Finding(False, "upstream's own type is there, not a stub")


def test_live_compares_parameters(written: Upstream, look: Live) -> None:
    findings = look(written.record("fakeup.module.run", "ours:narrow"))
    assert findings == {"one": Finding(False, "ours has no parameter b")}


def test_live_tells_the_bad_record_from_those_it_stops(written: Upstream, look: Live) -> None:
    bad = written.record("fakeup.module.run", "ours:run", name="bad", fingerprint=BAD)
    good = written.record("fakeup.module.Worker", "ours:Worker", name="good")
    findings = look(good, bad)
    assert findings["bad"].ok is False
    assert findings["bad"].why.startswith("the source of fakeup.module.run changed")
    assert findings["good"].ok is None
    assert findings["good"].why.startswith("not reached: fake.toml [bad]")


def test_live_reports_a_module_that_does_not_import(written: Upstream, look: Live) -> None:
    record = written.record("fakeup.module.run", "ours:run")
    written.write("fakeup.module", "raise ValueError('broken')")
    assert look(record) == {"one": Finding(False, "ValueError: broken")}


def test_live_reports_a_process_that_ends(written: Upstream) -> None:
    record = written.record("fakeup.module.run", "ours:run")
    assert live([record], activate="raise SystemExit('no lane')") == {
        "one": Finding(False, "the process ended: no lane")
    }


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, bool]]:
    import inspect

    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default is not p.empty) for p in found]


COMPATIBLE = [
    # upstream                        ours                                    why
    (lambda a, b=1: 0, lambda a, b=2: 0, ""),
    (lambda a, b=1: 0, lambda a, b=2, c=3: 0, ""),
    (lambda a, b=1: 0, lambda *args, **kwargs: 0, ""),
    (lambda a, *, b: 0, lambda a, *, b=1, c=2: 0, ""),
    (lambda a, *, b: 0, lambda a, **rest: 0, ""),
    (lambda a, /: 0, lambda z, /: 0, ""),
    (lambda self, a: 0, lambda self, *, a: 0, "ours does not take a by position"),
    (lambda a, b=1: 0, lambda a: 0, "ours has no parameter b"),
    (lambda a, b=1: 0, lambda a, b: 0, "b may be left out upstream, not in ours"),
    (lambda a, b: 0, lambda b, a: 0, "position 0 is a upstream and b in ours"),
    (lambda a: 0, lambda a, c: 0, "ours asks for c, which upstream does not have"),
    (lambda a: 0, lambda a, *, c: 0, "ours asks for c, which upstream does not have"),
    (lambda *args: 0, lambda a=1: 0, "upstream takes *args, ours does not"),
    (lambda **kwargs: 0, lambda a=1: 0, "upstream takes **kwargs, ours does not"),
    (lambda a, /: 0, lambda *, a: 0, "ours does not take a by position"),
]


@pytest.mark.parametrize(("upstream", "ours", "why"), COMPATIBLE)
def test_every_call_of_upstreams_must_be_taken(
    upstream: Callable[..., Any], ours: Callable[..., Any], why: str
) -> None:
    assert incompatibility(parameters(upstream), parameters(ours)) == why
