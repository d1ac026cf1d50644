"""jit_fuser in megatron-core: which functions get a kernel, what a changed source does, and the way back."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nxdt_nemo.errors import PatchError
from nxdt_nemo.megatron import jit
from nxdt_nemo.patching.fingerprint import locate
from nxdt_nemo.patching.view import load_object
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV
from nxdt_nemo.testing.pool import RankPool

FUSIONS = "megatron.core.fusions"


def decorated() -> list[str]:
    """Every function at the top of a module of megatron-core that is decorated with @jit_fuser, by full name."""
    place = locate("megatron.core")
    assert place is not None and place.file is not None
    found = []
    for file in sorted(place.file.parent.rglob("*.py")):
        if "@jit_fuser" in (text := file.read_text()):
            module = ".".join(["megatron.core", *file.relative_to(place.file.parent).with_suffix("").parts])
            for node in ast.parse(text).body:
                names = [ast.unparse(one) for one in getattr(node, "decorator_list", [])]
                if "jit_fuser" in names:
                    found.append(f"{module}.{node.name}")
    return found


def origins(names: list[str]) -> dict[str, str]:
    """For each: "package.module:name" of the function that its module has under this name, " (wrapped)" if one is."""
    found = {}
    for target in names:
        module, _, name = target.rpartition(".")
        function = getattr(importlib.import_module(module), name)
        plain = function.__code__.co_name == name and not hasattr(function, "_torchdynamo_orig_callable")
        found[target] = f"{function.__module__}:{function.__qualname__}" + ("" if plain else " (wrapped)")
    return found


@pytest.mark.ranks
def test_each_function_with_a_kernel_gets_it_and_the_others_stay_upstreams(active: Callable[..., Any]) -> None:
    names = decorated()
    assert jit.KERNELS.keys() < set(names)  # each is one that upstream decorates, and some are left
    expected = {name: ":".join(name.rsplit(".", 1)) for name in names}
    assert active(origins, names) == expected | {name: kernel.replacement for name, kernel in jit.KERNELS.items()}


def used() -> dict[str, str]:
    """What upstream computes with, where it looks the function up."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.fusions.fused_bias_gelu import GeLUFunction
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu, weighted_swiglu_back

    return {
        "training": get_bias_dropout_add(training=True, fused=True).__module__,
        "inference": get_bias_dropout_add(training=False, fused=True).__module__,
        "unfused": get_bias_dropout_add(training=True, fused=False).__module__,
        "gelu": GeLUFunction.forward.__globals__["bias_gelu"].__module__,
        "gelu, back": GeLUFunction.backward.__globals__["bias_gelu_back"].__module__,
        "bias_swiglu": bias_swiglu.__globals__["swiglu"].__module__,
        "weighted, back": weighted_swiglu_back.__globals__["swiglu_back"].__module__,
    }


@pytest.mark.ranks
def test_upstreams_other_functions_compute_with_the_kernels(active: Callable[..., Any]) -> None:
    ours, theirs = "nxdt_nemo.megatron.fusions.", f"{FUSIONS}."
    assert active(used) == {
        "training": ours + "fused_bias_dropout",
        "inference": theirs + "fused_bias_dropout",
        "unfused": theirs + "fused_bias_dropout",
        "gelu": ours + "fused_bias_gelu",
        "gelu, back": ours + "fused_bias_gelu",
        "bias_swiglu": ours + "fused_bias_swiglu",
        "weighted, back": ours + "fused_bias_swiglu",
    }


def test_a_function_without_a_kernel_is_returned_itself() -> None:
    def bias_gelu() -> None: ...  # not upstream's, which alone counts

    for function in (bias_gelu, origins, len):
        assert jit.jit_fuser(function) is function


# --- an upstream that changed ------------------------------------------------------------------------------------

CHANGES = [  # upstream's file, what stands there, what stands there now; the function that the error names
    ("fused_bias_gelu", "x * 0.5 * (1.0 + torch", "x * 0.5 * (1.1 + torch", "bias_gelu"),
    ("fused_bias_gelu", "return ff * g", "return g * ff", "bias_gelu_back"),
    ("fused_bias_gelu", "@jit_fuser\ndef bias_gelu(bias, y)", "@jit_fuser\ndef bias_gelu(y, bias)", "bias_gelu"),
    ("fused_bias_swiglu", "return F.silu(y_1) * y_2", "return y_1 * F.silu(y_2)", "swiglu"),
    ("fused_bias_swiglu", "g * F.silu(y_1)), -1", "g * F.silu(y_1)), 1", "swiglu_back"),
    ("fused_bias_dropout", "residual, prob, True)", "residual, prob / 2, True)", "bias_dropout_add_fused_train"),
    # not decorated itself, but the kernel computes in its place
    ("fused_bias_dropout", "out = residual + out", "out = residual - out", "_bias_dropout_add_func"),
]
UNCHANGED = [
    ("fused_bias_gelu", "# actual gelu is:", "# another comment"),
    ("fused_bias_swiglu", "Performs SwiGLU (Swish-Gated Linear Unit) activation function.", "Another docstring."),
    ("fused_bias_swiglu", "res = swiglu(y) * weights", "res = weights * swiglu(y)"),  # has no kernel
    ("fused_bias_dropout", "return bias_dropout_add_unfused(training)", "return None"),  # nor has this
]


def imported(file: str, old: str, new: str, folder: str) -> str:
    """The text of the error when upstream's module is imported anew from an edited copy, "" if there is none."""
    name = f"{FUSIONS}.{file}"
    parent, known = importlib.import_module(FUSIONS), importlib.import_module(name)
    text = Path(str(known.__file__)).read_text()
    assert old in text
    copy = Path(folder, f"{file}.py")
    copy.write_text(text.replace(old, new))
    parent.__path__.insert(0, folder)
    importlib.invalidate_caches()
    del sys.modules[name]
    try:
        assert importlib.import_module(name).__file__ == str(copy)
    except PatchError as error:
        assert name not in sys.modules
        return str(error)
    finally:
        parent.__path__.remove(folder)
        sys.modules[name] = known
        setattr(parent, file, known)
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize("file, old, new, function", CHANGES, ids=range(len(CHANGES)))
def test_a_changed_source_stops_the_import(
    active: Callable[..., Any], tmp_path: Path, file: str, old: str, new: str, function: str
) -> None:
    message = active(imported, file, old, new, str(tmp_path))
    kernel = next(one for one in jit.KERNELS.values() if function in one.sources)
    assert message.startswith(f"{FUSIONS}.{file}.{function} is not the one that {kernel.replacement} was written for: ")
    found, expected = message.rpartition(": sha256:")[2].split(", expected ")
    assert expected == kernel.sources[function] and len(found) == 64 and found not in expected


@pytest.mark.ranks
def test_a_helper_that_is_gone_stops_the_import_too(active: Callable[..., Any], tmp_path: Path) -> None:
    message = active(imported, "fused_bias_dropout", "_bias_dropout_add_func", "_renamed", str(tmp_path))
    assert "bias_dropout_add_fused_train is not the one" in message  # it calls the helper by another name
    message = active(imported, "fused_bias_dropout", "def _bias_dropout_add_func", "def _renamed", str(tmp_path))
    assert message.startswith("_bias_dropout_add_func is not defined in ")


@pytest.mark.ranks
@pytest.mark.parametrize("file, old, new", UNCHANGED, ids=range(len(UNCHANGED)))
def test_comments_docstrings_and_other_functions_may_change(
    active: Callable[..., Any], tmp_path: Path, file: str, old: str, new: str
) -> None:
    assert active(imported, file, old, new, str(tmp_path)) == ""


# --- the way in and out ------------------------------------------------------------------------------------------


def test_register_puts_ours_in_and_its_answer_puts_upstreams_back() -> None:
    theirs = object()
    module: Any = ModuleType("megatron.core.jit")
    module.jit_fuser = theirs
    undo = jit.register(module, SimpleNamespace())  # type: ignore[arg-type]
    assert module.jit_fuser is jit.jit_fuser
    undo()
    assert module.jit_fuser is theirs


def through_a_deactivation() -> dict[str, bool]:
    """Whether jit_fuser and a fusion are ours, and whether they are upstream's: what torch.compile was there then."""
    import megatron.core.jit as upstream
    from megatron.core.fusions import fused_bias_gelu

    import nxdt_nemo

    theirs = vars(upstream)["torch"].compile

    def ours(name: str) -> bool:
        return getattr(fused_bias_gelu, name).__module__.startswith("nxdt_nemo.")

    found = {"active": upstream.jit_fuser is jit.jit_fuser and ours("bias_gelu")}
    nxdt_nemo.deactivate()
    found["not active"] = upstream.jit_fuser is theirs and not ours("bias_gelu") and not ours("bias_gelu_back")
    nxdt_nemo.activate()
    found["active again"] = upstream.jit_fuser is jit.jit_fuser and ours("bias_gelu") and ours("bias_gelu_back")
    return found


@pytest.mark.ranks
def test_deactivate_puts_upstreams_back() -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    with RankPool(1, init=ACTIVE, env=ACTIVE_ENV, group=False) as pool:
        [found] = pool.run(through_a_deactivation)
    assert found == {"active": True, "not active": True, "active again": True}


def test_the_kernels_are_there() -> None:
    for kernel in jit.KERNELS.values():
        assert callable(load_object(kernel.replacement))
