"""Patcher: what is installed for each kind, what stops it, and that undo leaves upstream's own objects."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from nxdt_nemo.errors import NotOnNeuron, PatchError
from nxdt_nemo.patching.patcher import SCOPE, load_object

if TYPE_CHECKING:
    from conftest import MakePatcher, Upstream

UPSTREAM = '''
import functools
from abc import ABC

LIMIT = 3

def run(a, b=1):
    """Upstream's."""
    return ("upstream", a, b)

def other():
    return run(0)

class Base:
    def inherited(self):
        return "base"

class Worker(Base):
    size = 1

    def step(self, n, *, fast=False):
        return ("upstream", n, fast)

    @classmethod
    def make(cls, n):
        return ("upstream", cls.__name__, n)

    @staticmethod
    def tool(n):
        return ("upstream", n)

    @property
    def width(self):
        """How wide."""
        return 7

    @width.setter
    def width(self, value):
        self.seen = value

    @functools.cached_property
    def lazy(self):
        return "upstream"

    class Inner:
        def deep(self):
            return "upstream"
'''

OURS = """
import functools

def run(a, b=1):
    return ("ours", a, b)

def step(self, n, *, fast=False):
    return ("ours", type(self).__name__, n, fast)

def make(cls, n):
    return ("ours", cls.__name__, n)

def tool(n):
    return ("ours", n)

def width(self):
    return 8

def deep(self):
    return "ours"

LIMIT = 4

class Worker:
    @staticmethod
    def tool(n):
        return ("ours, static", n)

    @functools.cached_property
    def lazy(self):
        return "ours"

def around(original, /, *args, **kwargs):
    return ("around", original(*args, **kwargs))

def twice(original, /, *args, **kwargs):
    return ("twice", original(*args, **kwargs))
"""


@pytest.fixture
def module(upstream: Upstream) -> ModuleType:
    upstream.write("fakeup.module", UPSTREAM)
    upstream.write("ours", OURS)
    return upstream.load("fakeup.module")


REPLACED = [
    # target               replacement          use                                       result
    ("run", "run", lambda m: m.run(1), ("ours", 1, 1)),
    ("run", "run", lambda m: m.other(), ("ours", 0, 1)),
    ("LIMIT", "LIMIT", lambda m: m.LIMIT, 4),
    ("Worker.step", "step", lambda m: m.Worker().step(2, fast=True), ("ours", "Worker", 2, True)),
    ("Worker.make", "make", lambda m: m.Worker.make(3), ("ours", "Worker", 3)),
    ("Worker.tool", "tool", lambda m: m.Worker().tool(4), ("ours", 4)),
    ("Worker.tool", "Worker.tool", lambda m: m.Worker().tool(4), ("ours, static", 4)),
    ("Worker.width", "width", lambda m: m.Worker().width, 8),
    ("Worker.lazy", "Worker.lazy", lambda m: m.Worker().lazy, "ours"),
    ("Worker.Inner.deep", "deep", lambda m: m.Worker.Inner().deep(), "ours"),
]

WRAPPED = [
    ("run", lambda m: m.run(1, b=2), ("around", ("upstream", 1, 2))),
    ("Worker.step", lambda m: m.Worker().step(2, fast=True), ("around", ("upstream", 2, True))),
    ("Worker.make", lambda m: m.Worker.make(3), ("around", ("upstream", "Worker", 3))),
    ("Worker.make", lambda m: subclass(m.Worker).make(3), ("around", ("upstream", "Sub", 3))),
    ("Worker.tool", lambda m: m.Worker().tool(4), ("around", ("upstream", 4))),
    ("Worker.width", lambda m: m.Worker().width, ("around", 7)),
]


def subclass(base: type) -> Any:
    return type("Sub", (base,), {})


def raw(module: ModuleType, path: str) -> Any:
    """What the defining namespace itself holds; patches and undo are judged by its identity."""
    *above, name = path.split(".")
    owner: Any = module
    for part in above:
        owner = vars(owner)[part]
    return vars(owner)[name]


@pytest.mark.parametrize(("path", "ours", "use", "result"), REPLACED, ids=[f"{r[0]}-{r[1]}" for r in REPLACED])
def test_replace(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType, path: str, ours: str, use: Any, result: Any
) -> None:
    before = raw(module, path)
    one = patcher(upstream.record(f"fakeup.module.{path}", f"ours:{ours}"))
    one.apply_to(module)
    assert use(module) == result
    assert type(raw(module, path)) is type(before)
    one.undo()
    assert raw(module, path) is before


@pytest.mark.parametrize(("path", "use", "result"), WRAPPED, ids=[w[0] for w in WRAPPED])
def test_wrap(upstream: Upstream, patcher: MakePatcher, module: ModuleType, path: str, use: Any, result: Any) -> None:
    before = raw(module, path)
    one = patcher(upstream.record(f"fakeup.module.{path}", "ours:around", "wrap"))
    one.apply_to(module)
    assert use(module) == result
    one.undo()
    assert raw(module, path) is before


def test_a_wrapped_function_keeps_name_signature_and_pickle(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    before = inspect.signature(module.run)
    patcher(upstream.record("fakeup.module.run", "ours:around", "wrap")).apply_to(module)
    assert (module.run.__name__, module.run.__module__, module.run.__doc__) == ("run", "fakeup.module", "Upstream's.")
    assert inspect.signature(module.run) == before
    assert pickle.loads(pickle.dumps(module.run)) is module.run


def test_a_property_keeps_its_setter_and_text(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    for kind, ours in (("replace", "width"), ("wrap", "around")):
        one = patcher(upstream.record("fakeup.module.Worker.width", f"ours:{ours}", kind))  # type: ignore[arg-type]
        one.apply_to(module)
        worker = module.Worker()
        worker.width = 5
        assert worker.seen == 5
        assert module.Worker.width.__doc__ == "How wide."
        one.undo()


@pytest.mark.parametrize(
    ("path", "kind", "ours", "message"),
    [
        ("Worker", "wrap", "around", "is a class; wrap its __init__ or replace it"),
        ("LIMIT", "wrap", "around", "is a int and cannot be wrapped"),
        ("Worker.lazy", "replace", "width", "is a cached_property; replace it by one"),
        ("run", "replace", "absent", "the replacement does not load: ours:absent: no absent there"),
        ("Worker.inherited", "replace", "step", "is inherited; name the defining class: fakeup.module.Base.inherited"),
    ],
)
def test_what_cannot_be_done_is_said(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType, path: str, kind: Any, ours: str, message: str
) -> None:
    digest = None if path != "Worker.inherited" else upstream.fingerprint("fakeup.module.Base.inherited")
    record = upstream.record(f"fakeup.module.{path}", f"ours:{ours}", kind, fingerprint=digest)
    before = dict(vars(module.Worker))
    with pytest.raises(PatchError) as raised:
        patcher(record).apply_to(module)
    assert str(raised.value).startswith("fake.toml [one]: ")
    assert str(raised.value).endswith(message)
    assert dict(vars(module.Worker)) == before


def drifted(upstream: Upstream) -> list[Any]:
    """A good record and, in the same module, one whose source is not as recorded."""
    good = upstream.record("fakeup.module.run", "ours:run", name="good")
    bad = upstream.record("fakeup.module.Worker.step", "ours:step", name="bad", fingerprint="sha256:" + "0" * 64)
    return [good, bad]


def test_drift_stops_all_patches_of_the_module(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    before, one = module.run, patcher(*drifted(upstream))
    with pytest.raises(PatchError) as raised:
        one.apply_to(module)
    text = str(raised.value)
    line = UPSTREAM.splitlines().index("    def step(self, n, *, fast=False):") + 1
    assert text.startswith("fake.toml [bad]: the source of fakeup.module.Worker.step changed (")
    assert f"module.py:{line})" in text
    assert "sha256:000000000000... is recorded" in text
    assert module.run is before
    assert one.applied() == []


def test_a_swallowed_failure_comes_back(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.write("fakeup.second", "def go(): pass")
    one = patcher(*drifted(upstream))
    with pytest.raises(PatchError):
        one.apply_to(module)
    with pytest.raises(PatchError, match=r"\[bad\]"):
        one.apply_to(upstream.load("fakeup.second"))
    one.undo()
    one.apply_to(upstream.load("fakeup.second"))


def test_the_file_really_imported_counts_not_the_one_on_disk_first(
    upstream: Upstream, patcher: MakePatcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    upstream.write("fakeup.module", UPSTREAM)
    upstream.write("ours", OURS)
    record = upstream.record("fakeup.module.run", "ours:run")
    (tmp_path / "checkout/fakeup").mkdir(parents=True)
    (tmp_path / "checkout/fakeup/__init__.py").touch()
    (tmp_path / "checkout/fakeup/module.py").write_text(UPSTREAM.replace('"upstream", a, b', '"checkout", a, b'))
    monkeypatch.syspath_prepend(str(tmp_path / "checkout"))
    with pytest.raises(PatchError, match=r"source of fakeup\.module\.run changed \(.*checkout"):
        patcher(record).apply_to(upstream.load("fakeup.module"))


def test_versions_are_asked_before_the_source(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.release("fakeup-dist", "1.3.0")
    with pytest.raises(PatchError) as raised:
        patcher(*drifted(upstream)[1:]).apply_to(module)
    assert str(raised.value) == (
        "fake.toml [bad]: fakeup-dist 1.3.0 is installed; the record holds for fakeup-dist>=1.2,<1.3 only"
    )


def test_a_missing_distribution_fails(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    record = upstream.record("fakeup.module.run", "ours:run", versions="no-such-dist>=1")
    with pytest.raises(PatchError, match="no-such-dist is not installed"):
        patcher(record).apply_to(module)


def test_a_target_that_is_gone_fails(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    for target, message in (
        ("fakeup.module.gone", "fakeup.module.gone is gone; upstream moved or renamed it"),
        ("fakeup.module.Worker.gone", "fakeup.module.Worker.gone is gone; upstream moved or renamed it"),
        ("fakeup.module.Gone.step", "fakeup.module has no class or module Gone"),
    ):
        one = patcher(upstream.record(target, "ours:run", fingerprint="sha256:" + "0" * 64))
        with pytest.raises(PatchError) as raised:
            one.apply_to(module)
        assert str(raised.value) == f"fake.toml [one]: {message}"


def test_a_module_that_is_gone_fails_at_its_package(upstream: Upstream, patcher: MakePatcher) -> None:
    upstream.write("fakeup.other", "")
    one = patcher(upstream.record("fakeup.module.run", "ours:run", fingerprint="sha256:" + "0" * 64))
    assert one.modules() == {"fakeup", "fakeup.module"}
    with pytest.raises(PatchError, match=r"fakeup has no class or module module"):
        one.apply_to(upstream.load("fakeup"))


def test_a_moved_target_that_upstream_still_exports_fails(upstream: Upstream, patcher: MakePatcher) -> None:
    upstream.write("fakeup.moved", "def run(a, b=1): return 1")
    upstream.write("fakeup.module", "from fakeup.moved import run")
    record = upstream.record("fakeup.module.run", "ours:run", fingerprint=upstream.fingerprint("fakeup.moved.run"))
    with pytest.raises(PatchError, match="only imported; name the module that defines it"):
        patcher(record).apply_to(upstream.load("fakeup.module"))


def test_packages_on_the_way_are_left_alone(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    one = patcher(upstream.record("fakeup.module.run", "ours:run"))
    one.apply_to(upstream.load("fakeup"))
    assert one.applied() == []


def test_conditional_definitions(upstream: Upstream, patcher: MakePatcher) -> None:
    code = "try:\n    import nosuchthing\n    fuse = nosuchthing.fuse\nexcept ImportError:\n    fuse = len\n"
    upstream.write("ours", "def fuse(x): return x")
    file = upstream.write("fakeup.module", code)
    record = upstream.record("fakeup.module.fuse", "ours:fuse")
    module = upstream.load("fakeup.module")
    one = patcher(record)
    one.apply_to(module)
    assert module.fuse(5) == 5
    one.undo()
    assert module.fuse is len
    file.write_text(code.replace("nosuchthing.fuse", "nosuchthing.fused"))  # the branch that is not taken here
    with pytest.raises(PatchError, match="changed"):
        one.apply_to(module)


def test_orders_lower_first_whatever_the_files_say(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    before = module.run
    records = [
        upstream.record("fakeup.module.run", "ours:twice", "wrap", name="outer", order=20),
        upstream.record("fakeup.module.run", "ours:run", name="base", order=5),
        upstream.record("fakeup.module.run", "ours:around", "wrap", name="inner", order=10),
    ]
    one = patcher(*records)
    one.apply_to(module)
    assert module.run(1) == ("twice", ("around", ("ours", 1, 1)))
    assert [applied.record.id for applied in one.applied()] == ["base", "inner", "outer"]
    one.undo()
    assert module.run is before


def test_applying_again_changes_nothing(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    one = patcher(
        upstream.record("fakeup.module.run", "ours:around", "wrap", name="a"),
        upstream.record("fakeup.module.new", "ours:tool", "define", name="b"),
    )
    one.apply_to(module)
    first = module.run
    one.apply_to(module)
    assert module.run is first
    assert module.run(1) == ("around", ("upstream", 1, 1))
    assert len(one.applied()) == 2


def test_a_reloaded_module_is_patched_again(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    one = patcher(
        upstream.record("fakeup.module.run", "ours:run", name="function"),
        upstream.record("fakeup.module.Worker.step", "ours:step", name="method"),
    )
    one.apply_to(module)
    importlib.reload(module)
    reloaded = module.run
    assert module.Worker().step(1) == ("upstream", 1, False)
    one.apply_to(module)
    assert module.run(1) == ("ours", 1, 1)
    assert module.Worker().step(1) == ("ours", "Worker", 1, False)
    upstream.write("fakeup.late", "from fakeup.module import run as taken")
    late = upstream.load("fakeup.late")
    one.undo()
    assert module.run is late.taken is reloaded


def test_undo_is_idempotent_and_applying_may_follow(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    before, one = module.run, patcher(upstream.record("fakeup.module.run", "ours:run"))
    for _ in range(2):
        one.apply_to(module)
        assert module.run is not before
        one.undo()
        one.undo()
        assert module.run is before


def test_with_blocks_nest(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    before, one = module.run, patcher(upstream.record("fakeup.module.run", "ours:run"))
    with one:
        assert module.run is not before
        with one:
            pass
        assert module.run is not before
    assert module.run is before
    with pytest.raises(ZeroDivisionError), one:
        raise ZeroDivisionError
    assert module.run is before


def test_a_with_block_that_cannot_begin_leaves_nothing(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    upstream.write("fakeup.another", "def go(): return 1")
    before, another = upstream.load("fakeup.another").go, upstream.load("fakeup.another")
    one = patcher(upstream.record("fakeup.another.go", "ours:tool", name="first"), *drifted(upstream))
    with pytest.raises(PatchError, match=r"\[bad\]"), one:
        pytest.fail("it began")
    assert another.go is before
    with patcher(upstream.record("fakeup.another.go", "ours:tool")):
        assert another.go is not before


def test_two_patchers_on_one_target_unwind_in_turn(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    before = module.run
    first = patcher(upstream.record("fakeup.module.run", "ours:around", "wrap"))
    second = patcher(upstream.record("fakeup.module.run", "ours:twice", "wrap"))
    with first:
        middle = module.run
        with second:
            assert module.run(1) == ("twice", ("around", ("upstream", 1, 1)))
        assert module.run is middle
    assert module.run is before


def test_a_record_of_another_lane_does_nothing_at_all(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    before = module.run
    record = upstream.record("fakeup.module.run", "ours:run", lanes=("xla",), versions="no-such-dist>=1")
    patcher(record, lane="cpu").apply_to(module)
    assert module.run is before
    with pytest.raises(PatchError, match="no-such-dist"):
        patcher(record, lane="xla").apply_to(module)


def test_define_adds_and_undo_removes(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    one = patcher(
        upstream.record("fakeup.module.new", "ours:tool", "define", name="function"),
        upstream.record("fakeup.module.Worker.new", "ours:step", "define", name="method"),
        upstream.record("fakeup.module.library", "ours", "define", name="module"),
    )
    one.apply_to(module)
    assert module.new(1) == ("ours", 1)
    assert module.Worker().new(1) == ("ours", "Worker", 1, False)
    assert module.library is sys.modules["ours"]
    one.undo()
    assert not any(hasattr(owner, "new") for owner in (module, module.Worker))
    assert not hasattr(module, "library")


@pytest.mark.parametrize("path", ["run", "Worker.step", "Worker.inherited"])
def test_define_refuses_a_name_that_exists(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType, path: str
) -> None:
    with pytest.raises(PatchError, match="exists upstream now; it was to be defined"):
        patcher(upstream.record(f"fakeup.module.{path}", "ours:run", "define")).apply_to(module)


def test_define_refuses_a_module_that_exists(upstream: Upstream, patcher: MakePatcher) -> None:
    upstream.write("fakeup.helpers", "")
    upstream.write("ours", OURS)
    with pytest.raises(PatchError, match=r"fakeup\.helpers exists upstream now"):
        patcher(upstream.record("fakeup.helpers", "ours", "define")).apply_to(upstream.load("fakeup"))


def test_a_symbol_is_stubbed_and_comes_back(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    before = module.run
    one = patcher(
        upstream.record("fakeup.module.run", kind="stub", name="present"),
        upstream.record("fakeup.module.absent", kind="stub", name="absent"),
    )
    one.apply_to(module)
    for name in ("run", "absent"):
        with pytest.raises(NotOnNeuron, match=rf"fakeup\.module\.{name} is not available on Neuron: w"):
            getattr(module, name)()
    one.undo()
    assert module.run is before
    assert not hasattr(module, "absent")


def test_a_failure_while_setting_takes_back_what_was_set(upstream: Upstream, patcher: MakePatcher) -> None:
    upstream.write("ours", OURS)
    upstream.write(
        "fakeup.module",
        """
        class Closed(type):
            def __setattr__(cls, name, value):
                raise TypeError("closed")

        class Box(metaclass=Closed):
            def step(self): pass

        def run(a, b=1): return 1
        """,
    )
    module = upstream.load("fakeup.module")
    before = module.run
    one = patcher(
        upstream.record("fakeup.module.run", "ours:run", name="good"),
        upstream.record("fakeup.module.Box.step", "ours:step", name="closed"),
    )
    with pytest.raises(PatchError, match=r"\[closed\]: fakeup\.module\.Box\.step cannot be set: closed"):
        one.apply_to(module)
    assert module.run is before
    assert one.applied() == []


def test_a_replacement_may_import_what_it_replaces(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    upstream.write("ours", "from fakeup.module import Worker as Theirs\nclass Worker(Theirs):\n    size = 2\n")
    del sys.modules["fakeup.module"]
    fresh = upstream.load("fakeup.module")
    theirs = fresh.Worker
    one = patcher(upstream.record("fakeup.module.Worker", "ours:Worker"))
    one.apply_to(fresh)
    assert (fresh.Worker.size, fresh.Worker.__mro__[1]) == (2, theirs)
    one.undo()
    assert fresh.Worker is theirs


def test_applied_says_what_is_in_force(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    record = upstream.record("fakeup.module.run", "ours:run")
    one = patcher(record)
    assert one.applied() == []
    one.apply_to(module)
    (applied,) = one.applied()
    assert applied.record is record
    assert applied.file == str(upstream.root / "fakeup/module.py")
    one.undo()
    assert one.applied() == []


def test_load_object_names_what_is_missing(upstream: Upstream) -> None:
    upstream.write("ours", OURS)
    assert load_object("ours") is sys.modules["ours"]
    assert isinstance(load_object("ours:Worker.tool"), staticmethod)
    with pytest.raises(PatchError, match=r"ours:Worker\.absent: no absent there"):
        load_object("ours:Worker.absent")


def test_only_upstream_and_the_script_are_in_scope() -> None:
    assert {"hydra", "megatron", "nemo", "lightning", "pytorch_lightning", "__main__", "__mp_main__"} == SCOPE
