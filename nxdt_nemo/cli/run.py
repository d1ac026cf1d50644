"""`nxdt-nemo run`: a script or a module as `__main__`, exactly as python sets it up, with the backend active.

Room cli/. Imports no torch; the script decides what is loaded. It ends as python ends it, but for a
UserError, which is one line on rank 0 and exit code 2 on every rank; run_job stands in for
hydra.core.utils.run_job, which would make a traceback and exit code 1 of it.
Proof: tests/cli/test_run.py, test_endings.py, test_hydra.py.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from nxdt_nemo import console
from nxdt_nemo.cli import early, in_place, unsupported
from nxdt_nemo.errors import ConfigError, UserError

__all__ = ["Job", "install_hook", "leave", "run_job"]

# A launcher ends all ranks as soon as one has ended: the others let rank 0 say its line first.
_RANK_ZERO_SPEAKS = 1.0
# Functions of patching/view.py and finder.py that stand between an import statement and the module.
_IMPORTING = ("__import__", "answer", "exec_module")
_PATCHING = os.path.join(os.path.dirname(os.path.dirname(__file__)), "patching")


@dataclass(frozen=True)
class Job:
    """What to run, and the arguments that are its own.

    target  a script's path, or a module's name when `module` is true
    """

    target: str
    arguments: tuple[str, ...]
    module: bool = False

    def start(self) -> None:
        """Run it. Returns when it ends; ends the process with exit code 2 if a UserError stops it."""
        install_hook()
        try:
            self._start()
        except UserError as error:
            leave(error)

    def _start(self) -> None:
        if not self.module:
            _check_script(Path(self.target), self.arguments)
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        sys.argv[:] = ["-m" if self.module else self.target, *self.arguments]
        if not sys.flags.safe_path:
            sys.path[0] = os.getcwd() if self.module else os.path.dirname(os.path.realpath(self.target))
        os.environ["NXDT_NEMO"] = "1"  # for the children that the script, Lightning or a spawn worker starts
        code = None
        if self.module:
            _activate(main)  # finding the module imports the packages above it
            code = _prepare_module(main, self.target)
            sys.argv[0] = str(main.__file__)
            _precheck(Path(str(main.__file__)), self.arguments)
        else:
            _prepare_script(main, self.target)
            _precheck(Path(str(main.__file__)), self.arguments)
            _activate(main)
        _execute(main, code)


def _check_script(path: Path, arguments: Sequence[str] = ()) -> None:
    if path.is_file():
        text = path.read_bytes()
        in_place.run(path, text, arguments)
        unsupported.refuse(path, text)
        return
    if path.is_dir():
        raise UserError("is a folder, not a script", place=str(path))
    folder = path.parent
    if not folder.is_dir():
        raise UserError("no such script", place=str(path), fix=f"there is no folder {folder}")
    stems = [entry.stem for entry in folder.glob("*.py")]
    near = difflib.get_close_matches(path.name.removesuffix(".py"), stems, n=1)
    fix = f"did you mean {folder / near[0]}.py?" if near else ""
    raise UserError("no such script", place=str(path), fix=fix)


def _activate(main: ModuleType) -> None:
    """Arm the backend, and let the new `__main__` see torch and apex as upstream modules do."""
    import nxdt_nemo
    from nxdt_nemo._activation import builtins_for_main

    nxdt_nemo.activate()
    # Activated at interpreter start, it gave its view to the __main__ of that moment, not to this one.
    main.__dict__["__builtins__"] = builtins_for_main()


def _precheck(script: Path, arguments: tuple[str, ...]) -> None:
    """What can be checked before ranks and models exist: all findings, then exit code 2.

    The lane that the configuration names, and the environment that it needs, are handed on to children too.
    """
    from nxdt_nemo.config import precheck

    report = precheck(script, list(arguments), os.environ, also_errors=_more)
    if report is None or not report.errors:
        for line in early.prepare(report):
            console.warn(line)
        return
    *first, last = report.errors
    for error in first:
        _say(error)
    raise last


def _more(cfg: Any, ranks: int | None, place: str) -> Iterator[ConfigError]:
    """States that do not fit the instance that the configuration names, and bad lines of tuning data."""
    from nxdt_nemo.config.tuning_data import data_errors
    from nxdt_nemo.config.view import View
    from nxdt_nemo.megatron.memory_of_config import errors

    view = View(cfg, place=place)
    yield from data_errors(view)
    yield from errors(view, ranks)


def _prepare_script(main: ModuleType, script: str) -> None:
    path = os.path.abspath(script)
    main.__dict__.update(
        __file__=path,
        __cached__=None,
        __loader__=SourceFileLoader("__main__", path),
        __package__=None,
        __annotations__={},
    )


def _find(name: str) -> ModuleSpec:
    """The spec of a module, or of a package's `__main__`. Imports the packages above it, as python -m does."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None:
        raise UserError("no such module", place=f"-m {name}")
    return _find(f"{name}.__main__") if spec.submodule_search_locations is not None else spec


def _prepare_module(main: ModuleType, name: str) -> CodeType:
    spec = _find(name)
    code = spec.loader.get_code(spec.name) if isinstance(spec.loader, InspectLoader) else None
    if code is None:
        raise UserError("has no Python code to run", place=f"-m {name}")
    main.__dict__.update(
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
        __annotations__={},
    )
    return code


def _execute(main: ModuleType, code: CodeType | None) -> None:
    """Execute `code`, or what stands in the module's file, in the module's own namespace.

    Our last frame in a traceback; it compiles too, so that nothing of ours stands before a SyntaxError.
    """
    names: dict[str, Any] = main.__dict__
    if code is None:
        path = str(main.__file__)
        code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    exec(code, names)


def _say(error: UserError) -> None:
    if console.is_rank_zero():
        print(f"nxdt-nemo: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def leave(error: UserError) -> NoReturn:
    """Print the error in one line on rank 0 and end this process with the error's exit code.

    Raises SystemExit, which passes the `except Exception` of hydra, NeMo and Lightning, and runs atexit.
    """
    _say(error)
    if not console.is_rank_zero():
        time.sleep(_RANK_ZERO_SPEAKS)
    raise SystemExit(error.exit_code) from None


def install_hook() -> None:
    """Put a step before sys.excepthook: a UserError leaves in one line, other tracebacks show no frame of ours.

    Python takes the exit code from a SystemExit that an exception hook raises.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            leave(error)
        shown: BaseException | None = error.with_traceback(_of_script(trace))
        while shown is not None:
            shown.__traceback__ = _without_import_hook(shown.__traceback__)
            shown = shown.__cause__ or shown.__context__
        before(kind, error, error.__traceback__)

    sys.excepthook = hook


def _of_script(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback below _execute; all of it when that is not in it."""
    step = trace
    while step is not None:
        if step.tb_frame.f_code is _execute.__code__:
            return step.tb_next
        step = step.tb_next
    return trace


def _without_import_hook(trace: TracebackType | None) -> TracebackType | None:
    """Drops what our import hook adds below each import statement, as python drops importlib's own frames."""
    if trace is None:
        return None
    trace.tb_next = _without_import_hook(trace.tb_next)
    code = trace.tb_frame.f_code
    ours = code.co_name in _IMPORTING and os.path.dirname(code.co_filename) == _PATCHING
    # Python drops importlib's frames itself, but for those that lead to a loader which is not its own.
    return trace.tb_next if ours or code.co_filename.startswith("<frozen importlib.") else trace


def run_job(original: Any, /, *args: Any, **named: Any) -> Any:
    """hydra.core.utils.run_job: hydra keeps a task's exception to report it later; a UserError leaves here."""
    job = original(*args, **named)
    error = vars(job).get("_return_value")
    if isinstance(error, UserError):
        leave(error)
    return job
