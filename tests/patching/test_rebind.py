"""By-value bindings: who had taken upstream's object gets ours, and after undo upstream's again."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import MakePatcher, Upstream


@pytest.fixture
def module(upstream: Upstream) -> ModuleType:
    upstream.write("fakeup.module", "FLAG = False\n\ndef run(): return 'upstream'\n\nalias = run\n\nfuse = len\n")
    upstream.write("ours", "FLAG = True\n\ndef run(): return 'ours'\n\ndef fuse(x): return x\n")
    return upstream.load("fakeup.module")


TAKE = "from fakeup.module import run as taken, run, fuse, fuse as fused, FLAG, FLAG as flagged"


def test_a_function_is_rebound_under_any_name(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.write("fakeup.early", TAKE)
    early, before = upstream.load("fakeup.early"), module.run
    one = patcher(upstream.record("fakeup.module.run", "ours:run"))
    one.apply_to(module)
    assert {early.taken(), early.run(), module.alias()} == {"ours"}
    assert set(one.applied()[0].rebound) == {"fakeup.early.taken", "fakeup.early.run", "fakeup.module.alias"}
    one.undo()
    assert all(held is before for held in (early.taken, early.run, module.alias, module.run))


def test_an_alias_of_somebody_elses_object_is_rebound_under_its_own_name_only(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    upstream.write("fakeup.early", TAKE + "\nsize = len")
    early = upstream.load("fakeup.early")
    one = patcher(upstream.record("fakeup.module.fuse", "ours:fuse"))
    one.apply_to(module)
    assert early.fuse is sys.modules["ours"].fuse
    assert early.size is len
    one.undo()
    assert early.fuse is len


def test_plain_values_are_nobodys(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.write("fakeup.early", TAKE + "\nOTHER = False")
    early = upstream.load("fakeup.early")
    one = patcher(upstream.record("fakeup.module.FLAG", "ours:FLAG"))
    one.apply_to(module)
    assert (module.FLAG, early.FLAG, early.flagged, early.OTHER) == (True, False, False, False)
    vars(early)["OTHER"] = True
    one.undo()
    assert (module.FLAG, early.OTHER) == (False, True)


def test_other_libraries_are_never_touched(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.write("elsewhere", TAKE)
    elsewhere, before = upstream.load("elsewhere"), module.run
    one = patcher(upstream.record("fakeup.module.run", "ours:run"))
    one.apply_to(module)
    assert elsewhere.run is elsewhere.taken is before
    vars(elsewhere)["mine"] = sys.modules["ours"].run
    one.undo()
    assert elsewhere.mine is sys.modules["ours"].run


def test_the_script_is_rebound(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, before = ModuleType("__main__"), module.run
    vars(main)["run"] = before
    monkeypatch.setitem(sys.modules, "__main__", main)
    one = patcher(upstream.record("fakeup.module.run", "ours:run"))
    one.apply_to(module)
    assert vars(main)["run"]() == "ours"
    one.undo()
    assert vars(main)["run"] is before


def test_who_came_after_the_patch_gets_upstreams_object_at_undo(
    upstream: Upstream, patcher: MakePatcher, module: ModuleType
) -> None:
    before = module.run
    one = patcher(upstream.record("fakeup.module.run", "ours:run"))
    one.apply_to(module)
    upstream.write("fakeup.late", TAKE)
    late = upstream.load("fakeup.late")
    assert late.taken() == "ours"
    one.undo()
    assert late.taken is late.run is before


def test_what_a_module_set_itself_since_is_left(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.write("fakeup.early", TAKE)
    early = upstream.load("fakeup.early")
    one = patcher(upstream.record("fakeup.module.run", "ours:run"))
    one.apply_to(module)
    own = vars(early)["taken"] = object()
    one.undo()
    assert early.taken is own


@pytest.fixture
def shared(upstream: Upstream) -> ModuleType:
    """Two classes of upstream's for which one object of ours stands in."""
    upstream.write("fakeup.norms", "class First: pass\n\nclass Second: pass\n")
    upstream.write("ours", "class Norm: pass\n")
    return upstream.load("fakeup.norms")


def test_one_replacement_for_two_targets_goes_back_by_name(
    upstream: Upstream, patcher: MakePatcher, shared: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = shared.First, shared.Second
    one = patcher(
        upstream.record("fakeup.norms.First", "ours:Norm", name="first"),
        upstream.record("fakeup.norms.Second", "ours:Norm", name="second"),
    )
    one.apply_to(shared)
    upstream.write("fakeup.late", "from fakeup.norms import First, Second\nPick = Second")
    late = upstream.load("fakeup.late")
    one.undo()
    assert (shared.First, shared.Second, late.First, late.Second) == (first, second, first, second)
    assert "fakeup.late.Pick keeps our object" in capsys.readouterr().err


def test_two_names_of_one_object_keep_apart(upstream: Upstream, patcher: MakePatcher, module: ModuleType) -> None:
    upstream.write("ours", "def run(): return 'ours'\n\ndef alias(): return 'ours too'\n")
    upstream.write("fakeup.early", "from fakeup.module import run, alias")
    early, before = upstream.load("fakeup.early"), module.run
    one = patcher(
        upstream.record("fakeup.module.run", "ours:run", name="a"),
        upstream.record("fakeup.module.alias", "ours:alias", name="b"),
    )
    one.apply_to(module)
    assert (early.run(), early.alias()) == ("ours", "ours too")
    one.undo()
    assert early.run is early.alias is module.run is module.alias is before
