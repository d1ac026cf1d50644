"""One gloo rank of the fixture `ranks`: runs functions of test files, found by path, and sends their results.

Started as a script, never imported: python rank_main.py RANK WORLD STORE. Requests come pickled on stdin.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import traceback
from datetime import timedelta
from functools import cache
from types import ModuleType


@cache
def module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(os.path.basename(path).removesuffix(".py"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def main(rank: int, world: int, store: str) -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    from nxdt_nemo.runtime.cpu import CpuLane

    lane = CpuLane()
    lane.init_ranks(rank, world, init_method=f"file://{store}", timeout=timedelta(seconds=60))
    while True:
        try:
            path, name, args = pickle.load(requests)
        except EOFError:
            break
        try:
            answer = (True, getattr(module_at(path), name)(lane, *args))
        except Exception:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()
    os._exit(0)  # the others may be gone already; nobody waits for this rank any more


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
