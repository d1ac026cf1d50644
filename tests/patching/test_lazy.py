"""Imports that wait: over an upstream written to order, and every [[lazy]] entry against the installed one."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nxdt_nemo._resources import folder
from nxdt_nemo.patching.finder import UpstreamFinder
from nxdt_nemo.patching.view import Views

ROOT = Path(__file__).parents[2]
HEAVY = """
NAME, FLAG = "heavy", False
class Thing:
    size = 3
class Small(Thing): ...
thing = Thing()
def heavy(): return "the function"
def double(x): return 2 * x
"""


class Backend:
    """Views and their finder: fakeup is in a scope, elsewhere is in none."""

    def __init__(self) -> None:
        lazy = [
            {"importer": "fakeup", "defers": ["fakeup.heavy", "fakeup.parts.deep", "fakeup.gone", "elsewhere"]},
            {"importer": "fakeup.itself", "defers": ["fakeup.itself"]},
            {"importer": "elsewhere", "defers": ["fakeup.heavy"]},
        ]
        self.views = Views({"scope": {"upstream": ["fakeup"]}, "redirect": [], "lazy": lazy})
        self.finder = UpstreamFinder(self.views, lambda name: False, lambda module: None, {}.get)

    def leave(self) -> None:
        """As deactivation does."""
        self.views.disable()
        sys.meta_path.remove(self.finder)


@pytest.fixture
def backend(upstream) -> Iterator[Backend]:
    for name in ("fakeup.heavy", "fakeup.heavyweight", "fakeup.parts.deep", "elsewhere"):
        upstream.write(name, HEAVY.replace('"heavy"', f'"{name}"'))
    made = Backend()
    sys.meta_path.insert(0, made.finder)
    yield made
    if made.finder in sys.meta_path:
        made.leave()


Load = Callable[..., ModuleType]


@pytest.fixture
def load(upstream, backend) -> Load:
    """load(code): the package fakeup, executed with this code."""

    def load(code: str, module: str = "fakeup.") -> ModuleType:
        upstream.write(module, code)
        return importlib.import_module(module.removesuffix("."))

    return load


def loaded() -> set[str]:
    """Those of the modules that are worth waiting for that are loaded."""
    return {"fakeup.heavy", "fakeup.heavyweight", "fakeup.parts.deep", "elsewhere"} & set(sys.modules)


def seen_by_another(code: str) -> dict[str, Any]:
    """The globals of a module in no scope after this code."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names


WAITS = [  # fakeup's own code,                        what another module says,  what it gets,   what that loads
    ("from fakeup.heavy import NAME", "import fakeup; got = fakeup.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from .heavy import NAME", "import fakeup; got = fakeup.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from .heavy import NAME, thing", "import fakeup; got = fakeup.thing.size", 3, "fakeup.heavy"),
    ("from fakeup.heavy import NAME as X", "import fakeup; got = fakeup.X", "fakeup.heavy", "fakeup.heavy"),
    ("from fakeup.heavy import NAME", "from fakeup import NAME as got", "fakeup.heavy", "fakeup.heavy"),
    ("from fakeup.heavy import NAME", "from fakeup import *; got = NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from fakeup.heavy import NAME", "import fakeup.heavy; got = fakeup.heavy.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from fakeup.heavy import NAME", "import fakeup; got = fakeup.heavy.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from fakeup import heavy", "import fakeup; got = fakeup.heavy.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from . import heavy as h", "from fakeup import h; got = h.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from .parts.deep import NAME", "import fakeup; got = fakeup.NAME", "fakeup.parts.deep", "fakeup.parts.deep"),
    ("from .parts.deep import NAME", "import fakeup; got = fakeup.parts.__name__", "fakeup.parts", None),
    ("import elsewhere", "import fakeup; got = fakeup.elsewhere.NAME", "elsewhere", "elsewhere"),
    ("import elsewhere as e", "import fakeup; got = fakeup.e.NAME", "elsewhere", "elsewhere"),
    ("from elsewhere import NAME", "import fakeup; got = fakeup.NAME", "elsewhere", "elsewhere"),
    ("try:\n import elsewhere\nexcept ImportError:\n elsewhere = 0", "from fakeup import elsewhere as e; got = e.NAME",
     "elsewhere", "elsewhere"),
    ("from .heavy import double\ndef f(): return double(4)", "import fakeup; got = fakeup.f()", 8, "fakeup.heavy"),
    ("from .heavy import Thing\ndef f():\n class A(Thing): ...\n return A.size", "import fakeup; got = fakeup.f()", 3,
     "fakeup.heavy"),
    ("def f():\n from .heavy import NAME\n return NAME\nX = f()", "import fakeup; got = fakeup.X", "fakeup.heavy",
     "fakeup.heavy"),
    ("import elsewhere\nf = lambda: elsewhere.double(4)", "import fakeup; got = fakeup.f()", 8, "elsewhere"),
]  # fmt: skip


@pytest.mark.parametrize("code, other, got, loads", WAITS)
def test_a_name_waits_until_it_is_used(load, code, other, got, loads):
    load(code)
    assert loaded() == set()
    assert seen_by_another(other)["got"] == got
    assert loaded() == ({loads} if loads else set())


def test_what_was_asked_for_is_upstream_s_own_object_and_stays(load):
    module = load("from fakeup.heavy import Thing, thing\ndef f(): return Thing")
    real = module.Thing
    heavy = sys.modules["fakeup.heavy"]
    assert real is heavy.Thing is module.f() is vars(module)["Thing"]
    heavy.Thing = None  # type: ignore[attr-defined]
    assert real is module.Thing is module.f()
    assert "thing" not in vars(module), "the other name of the statement still waits"


AT_ONCE = [  # fakeup's own code, whose variable `got` is this, what it loads
    ("from .heavy import double; got = double(4)", 8, "fakeup.heavy"),
    ("from .heavy import Thing\nclass A(Thing): ...\ngot = (A.size, A.__mro__[1].__name__)", (3, "Thing"),
     "fakeup.heavy"),
    ("from .heavy import Thing; got = isinstance(Thing(), Thing)", True, "fakeup.heavy"),
    ("from .heavy import Thing; got = isinstance(1, Thing)", False, "fakeup.heavy"),
    ("from .heavy import Thing, Small; got = issubclass(Small.mro()[0], Thing)", True, "fakeup.heavy"),
    ("from .heavy import Thing; got = issubclass(int, Thing)", False, "fakeup.heavy"),
    ("from .heavy import FLAG; got = 1 if FLAG else 2", 2, "fakeup.heavy"),
    ("from fakeup import heavy; got = heavy.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("import elsewhere; got = elsewhere.NAME", "elsewhere", "elsewhere"),
    ("from .heavy import *; got = NAME", "fakeup.heavy", "fakeup.heavy"),
    ("import fakeup.heavy; got = fakeup.heavy.NAME", "fakeup.heavy", "fakeup.heavy"),  # binds fakeup: never waits
    ("import fakeup.heavy as h; got = h.NAME", "fakeup.heavy", "fakeup.heavy"),
    ("from .heavyweight import NAME; got = NAME", "fakeup.heavyweight", "fakeup.heavyweight"),  # not listed
]  # fmt: skip


@pytest.mark.parametrize("code, got, loads", AT_ONCE)
def test_a_use_at_module_level_loads_at_once(load, code, got, loads):
    module = load(code)
    assert loaded() == {loads}
    assert module.got == got


def test_statements_that_do_not_wait(load):
    """Unused, too: of a star it is not known what it binds, `import a.b` binds a, and the others are not listed."""
    for code in (
        "from .heavy import *",
        "import fakeup.heavy",
        "import fakeup.heavy as h",
        "from .heavyweight import NAME",
    ):
        load(code)
        assert loaded(), code
        for name in [name for name in sys.modules if name.partition(".")[0] == "fakeup"]:
            del sys.modules[name]


def test_a_name_that_hides_its_module_does_not_wait(load):
    """Else whoever imports fakeup.heavy himself would then find the module under the function's name."""
    load("from .heavy import heavy")
    import fakeup
    import fakeup.heavy

    assert fakeup.heavy() == "the function"


def test_the_same_under_another_name(load):
    module = load("from .heavy import double as heavy")
    assert module.heavy(4) == 8
    assert module.heavy(4) == 8


def test_others_get_it_at_once(load, upstream):
    load("from .heavy import NAME")
    upstream.write("fakeup.other", "from .heavy import NAME")
    assert importlib.import_module("fakeup.other").NAME == "fakeup.heavy"
    assert loaded() == {"fakeup.heavy"}


def test_an_importer_in_no_scope(load, upstream, monkeypatch):
    load("")
    upstream.write(
        "elsewhere", "from fakeup.heavy import NAME\ndef late():\n import fakeup.heavyweight\n return len('abc')"
    )
    module = importlib.import_module("elsewhere")
    assert loaded() == {"elsewhere"}
    assert module.NAME == "fakeup.heavy"
    assert {name for name in vars(builtins) if module.__builtins__[name] is not getattr(builtins, name)} == {
        "__import__"
    }
    asked: list[str] = []
    real = builtins.__import__
    with monkeypatch.context() as patch:  # a hook of somebody's that comes later is asked too
        patch.setattr(builtins, "__import__", lambda name, *rest: asked.append(name) or real(name, *rest))
        assert module.late() == 3
    assert "fakeup.heavyweight" in asked


def test_the_importer_keeps_its_view(load, backend):
    module = load("from .heavy import NAME")
    assert backend.views.serves(module)
    assert module.__builtins__["__import__"] is backend.views.import_for("upstream")


# --- errors --------------------------------------------------------------------------------------------


def test_what_is_not_installed_fails_at_the_statement(load):
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'fakeup\.gone'$"):
        load("from fakeup.gone import NAME")
    assert "fakeup" not in sys.modules
    module = load("try:\n from fakeup.gone import NAME\nexcept ImportError:\n HAVE = False\nelse:\n HAVE = True")
    assert module.HAVE is False
    assert not hasattr(module, "NAME")
    assert not hasattr(module, "gone")


def test_what_is_kept_out_fails_at_the_statement(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "elsewhere", None)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        load("import elsewhere")


def test_a_name_that_is_missing_is_an_import_error_when_asked_for(load):
    module = load("from .heavy import gone\ndef f(): return gone")
    for ask in (lambda: module.gone, module.f, lambda: seen_by_another("from fakeup import gone")):
        with pytest.raises(ImportError, match=r"cannot import name 'gone' from 'fakeup\.heavy'") as caught:
            ask()
        assert caught.value.name == "fakeup.heavy"


def test_a_module_that_fails_tells_so_each_time(load, upstream):
    upstream.write("fakeup.heavy", "raise RuntimeError('at import')")
    module = load("from .heavy import NAME")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="at import"):
            module.NAME  # noqa: B018
    upstream.write("fakeup.heavy", "NAME = 'repaired at last'")
    assert module.NAME == "repaired at last"


def test_other_names_are_python_s_own_errors(load):
    module = load("from .heavy import NAME\ndef f(): return nowhere")
    with pytest.raises(AttributeError, match=r"^module 'fakeup' has no attribute 'nowhere'$"):
        module.nowhere  # noqa: B018
    with pytest.raises(NameError, match="name 'nowhere' is not defined"):
        module.f()
    with pytest.raises(ImportError, match="cannot import name 'nowhere' from 'fakeup'"):
        seen_by_another("from fakeup import nowhere")
    assert loaded() == set()


# --- the importer's own ways -----------------------------------------------------------------------------

OWN = """
from .heavy import NAME
HERE = 1
def __getattr__(name):
    if name in ("NAME", "parts", "made"):
        return f"own {name}"
    raise AttributeError(f"no {name} of ours")
def __dir__():
    return ["HERE", "made"]
"""


def test_dir_lists_what_waits(load):
    module = load("from .heavy import NAME as X\nHERE = 1")
    assert {"X", "HERE", "__name__"} <= set(dir(module))
    assert dir(load(OWN, "fakeup.itself")) == ["HERE", "made"]
    assert loaded() == {"fakeup.heavy"}, "fakeup.itself defers its own modules only"


def test_its_own_getattr_is_asked_for_what_would_not_be_bound(load):
    module = load(OWN)
    assert dir(module) == ["HERE", "NAME", "made"]
    assert (module.NAME, module.made, module.parts) == ("fakeup.heavy", "own made", "own parts")
    with pytest.raises(AttributeError, match=r"^no nowhere of ours$"):
        module.nowhere  # noqa: B018


def test_a_package_that_defers_itself(load, upstream):
    upstream.write("fakeup.itself.one", "NAME = 1")
    upstream.write("fakeup.itself.two", "NAME = 2")
    module = load("from . import one\nfrom .two import NAME\n__all__ = ['NAME']", "fakeup.itself.")
    assert not {"fakeup.itself.one", "fakeup.itself.two"} & set(sys.modules)
    assert (module.two.NAME, module.one.NAME, module.NAME) == (2, 1, 2)
    assert [name for name in seen_by_another("from fakeup.itself import *") if name[0] != "_"] == ["NAME"]


def test_what_a_user_binds_wins(load, monkeypatch):
    module = load("from .heavy import NAME\ndef f(): return NAME")
    module.NAME = "a test's"
    assert (module.NAME, module.f()) == ("a test's", "a test's")
    assert loaded() == set()
    del module.NAME
    with monkeypatch.context() as patch:
        patch.setattr(module, "NAME", "a test's")
        assert module.f() == "a test's"
    assert module.f() == "fakeup.heavy"


def test_pickle(load):
    module = load("from .heavy import Thing\ndef f(): return Thing()")
    thing, function = pickle.loads(pickle.dumps([module.f(), module.f]))
    assert type(thing) is sys.modules["fakeup.heavy"].Thing
    assert function is module.f


def test_reload_puts_off_again(load, upstream):
    module = load("from .heavy import NAME\nROUND = 1")
    assert module.NAME == "fakeup.heavy"
    del sys.modules["fakeup.heavy"]
    upstream.write("fakeup.", "from .heavy import NAME\nROUND = 'second'")
    assert importlib.reload(module).ROUND == "second"
    assert loaded() == set()
    assert module.NAME == "fakeup.heavy"


def test_names_still_wait_when_the_backend_is_taken_out(load, backend):
    module = load("from .heavy import NAME, double\nimport elsewhere\ndef f(): return double(4)")
    backend.leave()
    assert loaded() == set()
    assert (module.NAME, module.f(), module.elsewhere.NAME) == ("fakeup.heavy", 8, "elsewhere")


# --- the entries of patches/views.toml -------------------------------------------------------------------

with (folder("patches") / "views.toml").open("rb") as file:
    ENTRIES: list[dict[str, Any]] = tomllib.load(file)["lazy"]
# What a pretraining script has no use for; all of it is loaded by the same imports in plain Python.
UNUSED = (
    "accelerate", "boto3", "fiddle", "jsonschema", "libcst", "networkx", "nltk", "numba", "onnx", "pangu", "sklearn",
    "torch_xla", "torchmetrics.functional.image", "torchmetrics.functional.text", "torchmetrics.text", "torchvision",
    "transformers.generation", "transformers.modeling_utils", "transformers.models",
)  # fmt: skip


class Told(dict[str, Any]):
    """What lazy_entries.py told."""

    def has(self, package: str) -> bool:
        return any(f"{name}.".startswith(f"{package}.") for name in self["loaded"])


@pytest.fixture(scope="module")
def plain_and_ours() -> tuple[Told, Told]:
    """Both at once, since NeMo's imports take their time; ours describes the names that plain Python has."""
    pytest.importorskip("nemo", reason="needs the extra: pip install nxdt-nemo[nemo]")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PJRT")}
    inherited |= {"PYTHONPATH": str(ROOT), "NXDT_NEMO": "", "NXDT_NEMO_RUNTIME": "cpu"}
    program = [str(Path(__file__).with_name("lazy_entries.py")), *(entry["importer"] for entry in ENTRIES)]
    plain, ours = (
        subprocess.Popen(
            [sys.executable, *command, *program],
            env=inherited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command in ((), ("-m", "nxdt_nemo", "run"))
    )  # fmt: skip
    first = _told(plain, "{}")
    return first, _told(ours, json.dumps({module: sorted(names) for module, names in first["names"].items()}))


def _told(process: subprocess.Popen[str], asked: str) -> Told:
    output, error = process.communicate(asked, timeout=500)
    assert process.returncode == 0, error[-3000:]
    return Told(json.loads(output.rpartition("RESULT ")[2]))


def test_a_script_s_imports_load_none_of_what_it_never_uses(plain_and_ours):
    _, ours = plain_and_ours
    assert [name for name in UNUSED if ours.has(name)] == []
    assert ours.has("torchmetrics.metric") and ours.has("megatron.core.models.gpt")


def installed(name: str) -> bool:
    """torch_xla is not, with the neuron lane's lock."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def test_plain_python_loads_all_of_it(plain_and_ours):
    """The control of the test above: it can fail."""
    plain, _ = plain_and_ours
    assert [name for name in UNUSED if installed(name) and not plain.has(name)] == []


by_entry = pytest.mark.parametrize("entry", ENTRIES, ids=[entry["importer"] for entry in ENTRIES])


@by_entry
def test_every_entry_puts_something_off_and_every_name_is_what_plain_python_binds(plain_and_ours, entry):
    plain, ours = plain_and_ours
    importer = entry["importer"]
    waits, before, after = (told[key][importer] for told, key in ((ours, "waits"), (plain, "names"), (ours, "names")))
    assert waits, "nothing in it waits: the entry is out of date"
    assert [name for name in before if name not in after] == []
    compared = {name: kind for name, kind in before.items() if name in waits or kind.startswith("module ")}
    assert set(waits) <= set(compared)
    assert {name: after[name] for name in compared} == compared


def test_no_stand_in_is_left_behind(plain_and_ours):
    """In a dictionary, a default or an annotation it would be there for good."""
    assert plain_and_ours[1]["left"] == []


def test_entries_are_told_apart_and_say_why():
    importers = [entry["importer"] for entry in ENTRIES]
    assert len(importers) == len(set(importers))
    assert [entry["importer"] for entry in ENTRIES if set(entry) != {"importer", "defers", "why"}] == []
