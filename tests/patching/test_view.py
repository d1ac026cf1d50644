"""What a module in scope sees when it imports a redirected name; fakes stand for torch, apex and TransformerEngine."""

from __future__ import annotations

import builtins
import importlib
import importlib.metadata
import pickle
import sys
import types
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from nxdt_nemo import console
from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.view import ModuleView, Overlay, Views


def table(real: ModuleType, scope: str) -> ModuleView:
    """The overlay's factory: `fakelib.where` is replaced by the scope's name, `fakelib.inner.deep` too."""
    inner = ModuleView(real.inner, {"deep": f"ours for {scope}"})
    return ModuleView(real, {"where": scope, "inner": inner})


TABLE: dict[str, Any] = {
    "scope": {"upstream": ["fakeup"], "main": ["__main__"]},
    "redirect": [
        {"name": "fakelib", "kind": "overlay", "replacement": "fakelib_table:table"},
        {"name": "fakeapex", "kind": "stand-in", "replacement": "ours.apex"},
        {"name": "fakeapex_C", "kind": "stand-in", "replacement": "ours.apex.parts", "part_of": "fakeapex"},
        {"name": "faketorchte", "kind": "absent"},
        {"name": "fakegone", "kind": "absent", "instead": {"fakeup.asks": "ours.apex"}},
    ],
}


@pytest.fixture
def fakes(upstream, monkeypatch) -> Any:
    upstream.write("fakelib.", "import fakelib.inner\nwhere = 'real'\ndef plain(): return 'real'\n")
    upstream.write("fakelib.inner", "deep = 'real'\nother = 'real'\n")
    upstream.write("ours.apex.parts", "NAME = 'ours'\n")
    upstream.write("ours.apex.broken", "import ours.not_there\n")
    monkeypatch.setitem(sys.modules, "fakelib_table", types.SimpleNamespace(table=table))
    monkeypatch.setattr(console, "_said", set())
    yield upstream
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fakelib", "fakeapex", "fakeapex_C")]:
        del sys.modules[name]


@pytest.fixture
def views(fakes) -> Iterator[Views]:
    made = Views(TABLE)
    yield made
    made.disable()


def seen(views: Views, code: str, scope: str = "upstream") -> dict[str, Any]:
    """The globals after executing `code` as a module of the scope."""
    names: dict[str, Any] = {"__builtins__": views.builtins_for(scope), "__name__": "fakeup.module"}
    exec(code, names)
    return names


IMPORTS = [  # statement, expression, what a module in scope sees
    ("import fakelib", "fakelib.where", "upstream"),
    ("import fakelib as short", "short.where", "upstream"),
    ("from fakelib import where", "where", "upstream"),
    ("import fakelib.inner", "fakelib.inner.deep", "ours for upstream"),
    ("import fakelib.inner", "fakelib.where", "upstream"),
    ("import fakelib.inner as short", "short.deep", "ours for upstream"),
    ("from fakelib import inner", "inner.deep", "ours for upstream"),
    ("from fakelib.inner import deep", "deep", "ours for upstream"),
    ("from fakelib.inner import deep, other", "other", "real"),
    ("from fakelib import *", "where", "upstream"),
    ("import fakelib", "fakelib.plain()", "real"),
    ("def f():\n    import fakelib\n    return fakelib.where", "f()", "upstream"),
    ("import fakeapex.parts", "fakeapex.parts.NAME", "ours"),
    ("import fakeapex.parts as short", "short.NAME", "ours"),
    ("from fakeapex.parts import NAME", "NAME", "ours"),
    ("from fakeapex import parts", "parts.NAME", "ours"),
    ("from fakeapex_C import NAME", "NAME", "ours"),
    ("import importlib", "importlib.import_module('fakelib').where", "upstream"),
    ("import importlib", "importlib.import_module('fakelib.inner').deep", "ours for upstream"),
    ("import importlib.util", "importlib.import_module('fakeapex.parts').NAME", "ours"),
    ("from importlib import import_module", "import_module('fakeapex_C').NAME", "ours"),
    ("import importlib", "importlib.import_module('.parts', 'ours.apex').NAME", "ours"),
    (
        "from importlib.metadata import version; from importlib import resources",
        "resources.__name__",
        "importlib.resources",
    ),
]


@pytest.mark.parametrize("statement, expression, expected", IMPORTS)
def test_import_forms(views, statement, expression, expected):
    names = seen(views, statement)
    assert eval(expression, names) == expected


def test_scopes_have_views_of_their_own(views):
    assert seen(views, "import fakelib", "main")["fakelib"].where == "main"
    assert seen(views, "import fakelib")["fakelib"].where == "upstream"
    assert seen(views, "import fakelib")["fakelib"] is seen(views, "import fakelib")["fakelib"]


def test_nobody_else_sees_them(views):
    seen(views, "import fakelib")
    names: dict[str, Any] = {}
    exec("import fakelib, fakelib.inner", names)
    assert (names["fakelib"].where, names["fakelib"].inner.deep) == ("real", "real")
    assert type(sys.modules["fakelib"]) is ModuleType
    with pytest.raises(ModuleNotFoundError):
        exec("import fakeapex", {})
    assert views.scope_of("fakeup.module") == "upstream"
    assert views.scope_of("fakeup_of_mine") is None


def test_a_name_that_is_not_there_is_an_import_error(views):
    with pytest.raises(ImportError, match="cannot import name 'gone' from 'fakelib'"):
        seen(views, "from fakelib import gone")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'fakelib\.gone'"):
        seen(views, "import fakelib.gone")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'fakeapex\.gone'") as caught:
        seen(views, "import fakeapex.gone")
    assert caught.value.name == "fakeapex.gone"


def test_an_error_within_the_stand_in_keeps_its_own_name(views):
    with pytest.raises(ModuleNotFoundError, match=r"ours\.not_there"):
        seen(views, "import fakeapex.broken")


def test_absent(views):
    with pytest.raises(ModuleNotFoundError, match="faketorchte") as caught:
        seen(views, "from faketorchte.pytorch import Linear")
    assert caught.value.name == "faketorchte.pytorch"
    with pytest.raises(ModuleNotFoundError, match="faketorchte"):
        seen(views, "import importlib\nimportlib.import_module('faketorchte.pytorch')")


def test_what_is_absent_has_a_stand_in_for_a_module_that_cannot_do_without(views):
    ask = "from fakegone.parts import NAME as found"
    names = {"__builtins__": views.builtins_for("upstream"), "__name__": "fakeup.asks"}
    exec(ask, names)
    assert names["found"] == "ours"
    with pytest.raises(ModuleNotFoundError, match="fakegone"):
        seen(views, ask)


VERSIONS = [
    "import importlib.metadata\nfound = importlib.metadata.version('faketorchte')",
    "from importlib.metadata import version\nfound = version('FakeTorchTE'.lower())",
    "from importlib import metadata\nfound = metadata.version('faketorchte')",
]


@pytest.mark.parametrize("code", VERSIONS)
def test_what_is_absent_has_version_0_for_upstream(views, code):
    """NeMo asks whether it is new enough, and has no case for none."""
    assert seen(views, code)["found"] == "0.0"
    with pytest.raises(importlib.metadata.PackageNotFoundError):  # a script may ask whether it is there
        seen(views, code, "main")
    views.active = False
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        seen(views, code)


def test_other_versions_are_the_installed_ones(views):
    code = "from importlib.metadata import version, metadata\nfound = version('pytest'), metadata('pytest')['Name']"
    assert seen(views, code)["found"] == (pytest.__version__, "pytest")


def test_an_installed_one_is_shadowed_with_one_notice_a_product(views, fakes, capsys):
    for name in ("fakeapex", "fakeapex_C", "faketorchte"):
        fakes.write(name, "NAME = 'theirs'\n")
    for _ in range(2):
        assert seen(views, "import fakeapex.parts")["fakeapex"].parts.NAME == "ours"
        assert seen(views, "import fakeapex_C")["fakeapex_C"].NAME == "ours"
        with pytest.raises(ModuleNotFoundError):
            seen(views, "import faketorchte")
        with pytest.raises(ModuleNotFoundError):
            seen(views, "from importlib import import_module\nimport_module('faketorchte')")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert "fakeapex" in lines[0]
    assert "faketorchte" in lines[1]


def test_no_notice_when_there_is_nothing_to_shadow(views, capsys):
    seen(views, "import fakeapex.parts")
    assert capsys.readouterr().err == ""


def test_a_view_writes_through_and_never_goes_stale(views):
    view = seen(views, "import fakelib")["fakelib"]
    real = sys.modules["fakelib"]
    assert view.plain() == "real"
    real.plain = lambda: "replaced by another library"  # type: ignore[attr-defined]
    assert view.plain() == "replaced by another library"
    view.added = 1
    assert real.added == 1
    del view.added
    assert not hasattr(real, "added")
    assert not hasattr(view, "added")
    view.where = "written"
    assert (real.where, view.where) == ("written", "upstream")


def test_a_view_passes_for_the_module(views):
    view = seen(views, "import fakelib")["fakelib"]
    real = sys.modules["fakelib"]
    assert isinstance(view, ModuleType)
    for name in ("__name__", "__file__", "__path__", "__spec__", "__package__"):
        assert getattr(view, name) == getattr(real, name)
    assert set(dir(view)) == set(dir(real)) | {"where", "inner"}
    assert pickle.loads(pickle.dumps(view)) is real


def test_disable_and_enable(views):
    code = "import fakelib\nfrom fakelib import inner\ndef late():\n    import fakelib\n    return fakelib\n"
    names = seen(views, code + "import importlib\nfrom importlib import import_module")
    assert views.serves(types.SimpleNamespace(**names))  # type: ignore[arg-type]
    views.disable()
    views.disable()
    assert (names["fakelib"].where, names["inner"].deep) == ("real", "real")
    assert names["late"]() is sys.modules["fakelib"]
    assert names["import_module"]("fakelib") is sys.modules["fakelib"]
    assert names["importlib"].import_module is importlib.import_module
    views.enable()
    assert (names["fakelib"].where, names["inner"].deep) == ("upstream", "ours for upstream")
    assert names["late"]() is names["fakelib"]


def test_builtins_are_python_s_but_for_import(views):
    given = views.builtins_for("upstream")
    assert {name for name in given if given[name] is not getattr(builtins, name)} == {"__import__"}
    assert given.keys() == vars(builtins).keys()
    assert not views.serves(sys.modules[__name__])


def test_unknown_kind():
    with pytest.raises(PatchError, match="'fakelib' has unknown kind 'mirror'"):
        Views({"scope": {"upstream": []}, "redirect": [{"name": "fakelib", "kind": "mirror"}]})


def test_an_overlay_is_built_when_it_is_first_asked_for(fakes):
    Overlay("not_a_module:nor_a_name", "upstream").disable()
    assert "fakelib" not in sys.modules
