"""One rank of nxdt_nemo.testing.pool: reads requests from a pipe, calls functions, sends results back.

Room testing/. Started as `python -m nxdt_nemo.testing.rank FD STACK_FILE STORE INIT`, never imported.
Imports torch only to open the process group, after INIT has run. Proof: tests/testing/test_pool.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(fd: str, stack_file: str, store: str, init: str) -> None:
    """Serve requests until the parent closes the pipe. An error at start-up answers the first request."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan when the parent is killed
    with open(stack_file, "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        pipe = Connection(int(fd))
        broken = _guarded(_prepare, store, init)
        place = {name: os.environ[name] for name in PLACE}
        while True:
            try:
                name, args, path = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                break
            sys.path.extend(entry for entry in path if entry not in sys.path)
            os.environ.update(place)  # Lightning's teardown deletes WORLD_SIZE
            answer = broken if not broken[0] else _guarded(_call, name, args)
            try:
                pipe.send_bytes(_pickled(answer))
            except BrokenPipeError:
                break
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for ranks that are gone; the parent has all it asked for


def _prepare(store: str, init: str) -> None:
    if init:
        _call(init, ())
    if store:
        import torch.distributed as dist

        if not dist.is_initialized():
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def _call(name: str, args: tuple[Any, ...]) -> Any:
    """`module:function` or `module:function@file`, see pool.function_name."""
    place, _, file = name.partition("@")
    module, _, function = place.partition(":")
    return getattr(_module(module, file), function)(*args)


def _module(name: str, file: str) -> Any:
    """By name, unless that is missing or another file's (a stray package called `tests`, say): then by file."""
    try:
        module = importlib.import_module(name)
        if not file or getattr(module, "__file__", None) == file:
            return module
    except ModuleNotFoundError as error:
        if not file or not f"{name}.".startswith(f"{error.name}."):
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _guarded(function: Any, *args: Any) -> tuple[Any, ...]:
    """(True, value), or (False, exception's class name, traceback)."""
    try:
        return True, function(*args)
    except (Exception, SystemExit) as error:
        return False, type(error).__name__, traceback.format_exc()


def _pickled(answer: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(answer)
    except Exception as error:
        return pickle.dumps((False, type(error).__name__, f"the result cannot be sent to the parent: {error}\n"))


if __name__ == "__main__":
    main(*sys.argv[1:])
