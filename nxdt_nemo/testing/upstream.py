"""pytest plugin `-p nxdt_nemo.testing.upstream`: tests of NeMo and Megatron code run through this backend.

Room testing/. For NVIDIA's own tests (tools/test_upstream.py) and for yours. The backend has to be active before
anything imports NeMo or Megatron, and conftest.py files do: a plugin named with -p is loaded before them. The lane
is cpu unless NXDT_NEMO_RUNTIME says otherwise. What a test puts into torch's place, NeMo and Megatron see too.
Proof: tests/testing/test_upstream.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nxdt_nemo import activate, deactivate, is_active
from nxdt_nemo._activation import views
from nxdt_nemo.errors import NxdtError
from nxdt_nemo.patching.finder import UpstreamFinder
from nxdt_nemo.patching.view import ModuleView
from nxdt_nemo.runtime.select import VARIABLE

__all__ = ["pytest_addoption", "pytest_load_initial_conftests", "pytest_report_header"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--nxdt-view PACKAGE, --nxdt-te MODULE."""
    parser.addoption(
        "--nxdt-view",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="top-level package whose modules see the backend's torch, as a script does; for tests that name CUDA",
    )
    parser.addoption(
        "--nxdt-te",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that may `import transformer_engine` and is told that it has no FP8; for tests that do not use it",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Arm the backend. Raises pytest.UsageError, one line, if NeMo is there already or the lane is not."""
    if not is_active():  # else NXDT_NEMO=1 came first: whose it is, takes it out
        try:
            activate(os.environ.get(VARIABLE, "cpu"))
        except NxdtError as error:
            raise pytest.UsageError(f"nxdt-nemo: {error}") from error
        early_config.add_cleanup(deactivate)
    options = early_config.known_args_namespace
    early_config.add_cleanup(show_views(options.nxdt_view))
    views().grant("transformer_engine", options.nxdt_te, "nxdt_nemo.testing.transformer_engine")
    early_config.add_cleanup(show_mocks())


def pytest_report_header() -> str:
    """A line of pytest's header, so that a log says what it was."""
    from nxdt_nemo.runtime import current

    return f"nxdt_nemo: {current().name} lane"


def show_views(packages: Iterable[str]) -> Callable[[], None]:
    """Let modules of these packages that are imported from now on be scripts of ours; returns what takes it back."""
    scopes = views().scopes
    before = scopes["main"]
    scopes["main"] = before.union(packages)
    # Before pytest's own hook, which stands in front when the backend was active before pytest.
    sys.meta_path.sort(key=lambda finder: not isinstance(finder, UpstreamFinder))
    return lambda: scopes.update(main=before)


def show_mocks() -> Callable[[], None]:
    """Let every view give way to what has been put into its module since; returns what takes it back.

    mock.patch("torch.cuda.is_available") and monkeypatch reach the real torch, and a view answers without asking it.
    For tests only: each access pays for the look.
    """
    import importlib

    import torch

    modules = (importlib, torch, torch.amp, torch.cuda, torch.cuda.amp, torch.cuda.random, torch.distributed, torch.jit)
    found = {id(module): dict(vars(module)) for module in modules}

    def look(view: ModuleView, name: str) -> Any:
        state = object.__getattribute__(view, "__dict__")
        if name in state.get("_overlay", ()):
            real = state["_real"]
            before = found.get(id(real), {})
            if name in before and vars(real).get(name) is not before[name]:
                return getattr(real, name)
        return object.__getattribute__(view, name)

    ModuleView.__getattribute__ = look  # type: ignore[method-assign, assignment]
    return lambda: delattr(ModuleView, "__getattribute__")
