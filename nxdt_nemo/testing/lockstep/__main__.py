"""The command `python -m nxdt_nemo.testing.lockstep`; see the package.

Room testing/. Forks: nothing may have started a thread before.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest

from nxdt_nemo import activate
from nxdt_nemo.runtime.select import VARIABLE
from nxdt_nemo.testing import lockstep
from nxdt_nemo.testing.lockstep.coordinator import Coordinator, Limits
from nxdt_nemo.testing.lockstep.groups import limit_groups
from nxdt_nemo.testing.lockstep.record import Record
from nxdt_nemo.testing.lockstep.worker import Worker, end_with_parent

PLUGIN = "nxdt_nemo.testing.upstream"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(
        prog="python -m nxdt_nemo.testing.lockstep", description=str(lockstep.__doc__).splitlines()[0]
    )
    found.add_argument("--ranks", type=int, required=True, help="how many")
    found.add_argument("--record", type=Path, help="file to append to: a test passes if it does on every rank")
    found.add_argument("--logs", type=Path, help="folder for what ranks 1 and up print; default: nothing is kept")
    found.add_argument("--basetemp", type=Path, help="pytest's, a folder in it for each rank; default: pytest's choice")
    found.add_argument("--preload", action="append", default=[], metavar="MODULE", help="imported once for all ranks")
    found.add_argument("--test-timeout", type=float, default=300.0, help="seconds a test may take on all ranks")
    found.add_argument("--wait-timeout", type=float, default=60.0, help="seconds a process group may wait")
    found.add_argument("pytest", nargs="*", help="after --: what pytest gets")
    return found


def main() -> int:
    """Exit code: pytest's, of rank 0."""
    args = parser().parse_args()
    activate(os.environ.get(VARIABLE, "cpu"))
    for module in args.preload:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="nxdt_nemo_lockstep_") as folder:
        stacks = [Path(folder) / f"rank{rank}.stack" for rank in range(args.ranks)]
        ranks = [_fork(args, rank, stack) for rank, stack in enumerate(stacks)]
        pipes = [pipe for _, pipe in ranks]
        Coordinator(pipes, stacks, Limits(test_s=args.test_timeout)).serve()
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, _ in ranks]
    return codes[0]


def _fork(args: argparse.Namespace, rank: int, stack: Path) -> tuple[int, Connection]:
    """A rank's process id, and our end of its pipe."""
    ours, theirs = Pipe()
    process = os.fork()
    if process:
        theirs.close()
        return process, ours
    code = 1
    try:
        ours.close()
        end_with_parent()
        code = _rank(args, rank, Worker(theirs, stack))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _rank(args: argparse.Namespace, rank: int, worker: Worker) -> int:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "LOCAL_WORLD_SIZE": args.ranks}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    limit_groups(args.wait_timeout)  # before the plugin looks at torch, which takes what changes later for a mock
    words = ["-p", PLUGIN, *args.pytest]
    if args.basetemp:
        words.append(f"--basetemp={args.basetemp / f'rank{rank}'}")
    plugins: list[object] = [worker]
    if rank == 0 and args.record:
        plugins.append(Record(args.record.absolute()))
    if rank > 0:
        _print_to(args.logs / f"rank{rank}.log" if args.logs else Path(os.devnull))
    return int(pytest.main(words, plugins=plugins))


def _print_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
