"""The import hook over an upstream written to order: views before, patches after, and nothing else disturbed."""

from __future__ import annotations

import builtins
import copy
import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import runpy
import sys
import traceback
from collections.abc import Iterator
from importlib.abc import InspectLoader
from types import ModuleType

import pytest

from nxdt_nemo.patching.finder import UpstreamFinder
from nxdt_nemo.patching.view import Views

CODE = '''
"""A module of upstream's."""
class Thing:
    def __init__(self, size):
        self.size = size
def double(x):
    return 2 * x  # the comment that getsource must find
'''


class Hook:
    """The finder, and what it reported: modules as they were when `after` saw them."""

    def __init__(self) -> None:
        self.views = Views({"scope": {"upstream": ["fakeup"]}, "redirect": []})
        self.seen: list[str] = []
        self.stubs: dict[str, ModuleType] = {}
        self.finder = UpstreamFinder(self.views, lambda name: name == "fakeup.code", self.after, self.stubs.get)

    def after(self, module: ModuleType) -> None:
        self.seen.append(f"{module.__name__} {hasattr(module, 'double')}")


@pytest.fixture
def hook(upstream) -> Iterator[Hook]:
    upstream.write("fakeup.code", CODE)
    upstream.write("elsewhere", "X = 1\n")
    made = Hook()
    sys.meta_path.insert(0, made.finder)
    yield made
    sys.meta_path.remove(made.finder)


def test_before_and_after(hook):
    module = importlib.import_module("fakeup.code")
    assert hook.seen == ["fakeup.code True"]
    assert hook.views.serves(module)
    assert hook.views.serves(sys.modules["fakeup"])
    assert module.__builtins__["__import__"] is not builtins.__import__


def test_others_are_left_alone(hook):
    module = importlib.import_module("elsewhere")
    assert module.__builtins__ == vars(builtins)
    assert hook.finder.find_spec("elsewhere", None) is None


def test_the_module_looks_as_python_made_it(hook, upstream):
    module = importlib.import_module("fakeup.code")
    kind = importlib.machinery.SourceFileLoader
    assert type(module.__loader__) is kind
    assert type(module.__spec__.loader) is kind
    assert module.__file__ == str(upstream.root / "fakeup" / "code.py")
    assert "the comment that getsource must find" in inspect.getsource(module.double)
    assert "class Thing" in inspect.getsource(module.Thing)
    assert pkgutil.get_data("fakeup", "code.py") == CODE.encode()


def test_pickle(hook):
    module = importlib.import_module("fakeup.code")
    back = pickle.loads(pickle.dumps([module.Thing(3), module.double]))
    assert type(back[0]) is module.Thing
    assert (back[0].size, back[1](4)) == (3, 8)


def test_reload_goes_through_the_hook_again(hook, upstream):
    module = importlib.import_module("fakeup.code")
    first = module.double
    upstream.write("fakeup.code", CODE.replace("2 * x", "20 * x"))
    assert importlib.reload(module) is module
    assert (module.double(1), first(1)) == (20, 2)
    assert hook.seen == ["fakeup.code True"] * 2
    assert hook.views.serves(module)


def test_walk_packages(hook, upstream):
    upstream.write("fakeup.below.leaf", "")
    package = importlib.import_module("fakeup")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, "fakeup.")]
    assert sorted(names) == ["fakeup.below", "fakeup.below.leaf", "fakeup.code"]


def test_python_dash_m(hook):
    names = runpy.run_module("fakeup.code", run_name="fakeup.as_main")
    assert names["double"](2) == 4
    spec = importlib.util.find_spec("fakeup.code")
    assert isinstance(spec.loader, InspectLoader)  # what asks for code before it runs a module
    assert spec.loader.get_code("fakeup.code") is not None
    assert spec.loader.get_source("fakeup.code") == CODE
    assert spec.loader.is_package("fakeup.code") is False
    assert spec.loader.get_filename("fakeup.code") == spec.origin
    assert copy.copy(spec.loader).get_source("fakeup.code") == CODE


def test_a_failing_import_is_not_kept_and_names_its_line(hook, upstream):
    upstream.write("fakeup.bad", "import fakeup.worse\n")
    upstream.write("fakeup.worse", "x = 1\nraise RuntimeError('at import')\n")
    with pytest.raises(RuntimeError, match="at import") as caught:
        importlib.import_module("fakeup.bad")
    text = "".join(traceback.format_exception(caught.value))
    assert 'fakeup/bad.py", line 1, in <module>\n    import fakeup.worse' in text
    assert "fakeup/worse.py\", line 2, in <module>\n    raise RuntimeError('at import')" in text
    assert "fakeup.bad" not in sys.modules
    assert "fakeup.worse" not in sys.modules


def test_a_missing_module_is_python_s_own_error(hook):
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'fakeup\.gone'$"):
        importlib.import_module("fakeup.gone")
    assert importlib.util.find_spec("fakeup.gone") is None


def test_a_namespace_package(hook, upstream):
    (upstream.root / "fakeup" / "__init__.py").unlink()
    importlib.invalidate_caches()
    assert importlib.import_module("fakeup.code").double(1) == 2
    assert hook.views.serves(sys.modules["fakeup.code"])


def test_a_stub_is_loaded_in_place_of_a_module(hook):
    hook.stubs["fakeup.made"] = ModuleType("fakeup.made")
    assert importlib.import_module("fakeup.made") is hook.stubs["fakeup.made"]


def test_an_error_of_the_patches_stops_the_import(hook):
    def fail(module: ModuleType) -> None:
        raise LookupError("upstream moved")

    hook.finder._after = fail
    with pytest.raises(LookupError, match="upstream moved"):
        importlib.import_module("fakeup.code")
    assert "fakeup.code" not in sys.modules
