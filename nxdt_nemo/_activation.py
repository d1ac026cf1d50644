"""Arming the backend in a process: the import hook, the views and the patches, put together.

Above all rooms, since it hands the runtime's lane to the patching leaf. Imports no torch.
Proof: tests/test_activation.py.
"""

from __future__ import annotations

import builtins
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nxdt_nemo._resources import folder
from nxdt_nemo.errors import UserError
from nxdt_nemo.patching.finder import UpstreamFinder
from nxdt_nemo.patching.patcher import Patcher
from nxdt_nemo.patching.records import load
from nxdt_nemo.patching.view import Views, load_object
from nxdt_nemo.runtime import select
from nxdt_nemo.runtime.environment import set_variable
from nxdt_nemo.runtime.select import forget

__all__ = ["activate", "builtins_for_main", "deactivate", "is_active", "views"]

VARIABLE = "NXDT_NEMO"


@dataclass
class _Active:
    finder: UpstreamFinder
    patcher: Patcher
    views: Views
    undo: list[Callable[[], None]]


_active: _Active | None = None
# One for the process: modules that were imported under it keep its `__import__` when the backend is taken out.
_views: Views | None = None


def is_active() -> bool:
    """True while the backend is armed in this process."""
    return _active is not None


def views() -> Views:
    """The views in force. Raises RuntimeError when the backend is not active."""
    if _active is None:
        raise RuntimeError("nxdt_nemo is not active")
    return _active.views


def _refuse_if_late() -> None:
    """Upstream modules that saw the real torch cannot be helped; those of an earlier activation can."""
    for name in ("nemo", "megatron.core"):
        module = sys.modules.get(name)
        if module is None or not getattr(module, "__file__", None):
            continue
        if _views is None or not _views.serves(module):
            raise UserError(
                f"{name} was imported before the backend was activated",
                place="nxdt_nemo.activate()",
                fix=f"call it before the first import of nemo or megatron, or set {VARIABLE}=1",
            )


def _lane_name() -> str:
    from nxdt_nemo.runtime import current

    return current().name


def activate(runtime: str | None = None) -> None:
    """See nxdt_nemo.activate."""
    global _active, _views
    if _active is not None:
        return
    _refuse_if_late()
    from nxdt_nemo.runtime.select import VARIABLE as RUNTIME

    lane, _ = select(runtime)
    records = folder("patches")
    with (records / "views.toml").open("rb") as file:
        table = tomllib.load(file)
    seen = _views = _views or Views(table)
    patcher = Patcher(load(records), _lane_name)
    registrations = {entry["module"]: entry["call"] for entry in table["on_import"]}
    targets = patcher.modules()
    undo: list[Callable[[], None]] = []

    def after(module: ModuleType) -> None:
        if module.__name__ in targets:
            patcher.apply_to(module)
        if module.__name__ in registrations:
            undo.append(load_object(registrations[module.__name__])(module, seen))

    wanted = targets | registrations.keys()

    def is_wanted(name: str) -> bool:
        return name in wanted or patcher.stub_for(name) is not None

    finder = UpstreamFinder(seen, is_wanted, after, patcher.stub_for)
    _active = _Active(finder, patcher, seen, undo)
    try:
        seen.enable()
        if runtime is not None:
            undo.append(set_variable(RUNTIME, runtime))
        undo.append(set_variable(VARIABLE, "1"))
        undo.append(lane.enter_process())
        undo.append(_put_first(finder))
        undo.append(_view_for_main(seen))
        for name in sorted(wanted & set(sys.modules)):
            after(sys.modules[name])
    except BaseException:  # a lane or a patch that fails leaves nothing behind
        deactivate()
        raise


def deactivate() -> None:
    """See nxdt_nemo.deactivate."""
    global _active
    if _active is None:
        return
    state, _active = _active, None
    state.patcher.undo()
    state.views.disable()
    for step in reversed(state.undo):
        step()
    forget()


def builtins_for_main() -> dict[str, Any]:
    """What `__main__` gets as `__builtins__` before a script is executed in it."""
    return views().builtins_for("main")


def _put_first(finder: UpstreamFinder) -> Callable[[], None]:
    sys.meta_path.insert(0, finder)

    def restore() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)

    return restore


def _view_for_main(seen: Views) -> Callable[[], None]:
    """Let `__main__` see the views: its next frames by its own builtins, a running one by a narrow filter.

    A frame that runs already keeps the builtins it started with, and multiprocessing executes a script as
    `__mp_main__` in a namespace that it makes itself: for those two, the process's `__import__` looks at
    who asks. It is put in place only where such a frame can be.
    """
    main: ModuleType = sys.modules["__main__"]
    before = main.__dict__.get("__builtins__", builtins)
    main.__dict__["__builtins__"] = seen.builtins_for("main")
    in_script = any(frame.f_globals is main.__dict__ for frame in _frames())
    # A spawned child has an option of that name, a forkserver the module in its -c command.
    if not in_script and not any("multiprocessing" in word for word in sys.orig_argv[1:]):
        return lambda: main.__dict__.__setitem__("__builtins__", before)
    real = builtins.__import__
    viewed = seen.import_for("main")

    def __import__(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:  # noqa: A001, A002, N807
        asked_by = globals.get("__name__") if globals else None
        return (viewed if asked_by in seen.scopes["main"] else real)(name, globals, *rest, **named)

    builtins.__import__ = __import__

    def restore() -> None:
        main.__dict__["__builtins__"] = before
        if builtins.__import__ is __import__:  # else somebody's hook stands on ours, which lets all pass now
            builtins.__import__ = real

    return restore


def _frames() -> list[Any]:
    found, frame = [], sys._getframe(1)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return found
