"""A pool of ranks that is started once and runs many functions.

Room testing/. Stands in for no upstream module (it does what torchrun does for a script, for functions).
The parent imports the standard library only; each rank is an interpreter of its own (nxdt_nemo.testing.rank),
so the parent needs no torch. Proof: tests/testing/test_pool.py.

    with RankPool(2) as pool:
        sums = pool.run("my_tests.steps:all_reduced", 3.0)   # one result a rank, in the order of the ranks
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["RankError", "RankPool", "RankPools", "function_name", "lane_here"]

ENDED = ("exit", "timeout")
MOST_THREADS = 200
GRACE_S = 5.0  # how long the others may take once one rank has failed: they may wait for it in a collective


class RankError(RuntimeError):
    """A rank raised, died or hung.

    rank      the first one that did
    kind      the name of the exception's class, "exit" when the process ended, "timeout" when it hung
    Its text holds that rank's traceback, or every rank's stack after a timeout.
    """

    def __init__(self, rank: int, kind: str, text: str) -> None:
        self.rank, self.kind = rank, kind
        super().__init__(f"rank {rank}: {kind}\n{text}")


@dataclass
class _Rank:
    """One rank's process, our end of its pipe, and what it prints or dumps."""

    process: subprocess.Popen[bytes]
    pipe: Connection[bytes, bytes]
    log: Path
    stack: Path


@dataclass
class _Answer:
    """What a rank sends back: ok and its value, or the exception's class name and traceback."""

    ok: bool
    value: Any = None
    kind: str = ""
    text: str = ""


def function_name(function: str | Callable[..., Any]) -> str:
    """`module:name@file` of a function at the top of its module; a string (`module:name` will do) passes through.

    The file is for modules that no rank could import by name, as pytest's importlib mode makes them.
    """
    if isinstance(function, str):
        return function
    module, name = sys.modules[function.__module__], function.__qualname__
    if getattr(module, name, None) is not function:
        raise ValueError(f"{function.__module__}.{name} is not at the top of its module, so no rank can import it")
    return f"{function.__module__}:{name}@{getattr(module, '__file__', '')}"


@dataclass
class RankPool:
    """`world` gloo ranks on this machine.

    init      "module:function" or what function_name gives: called without arguments in each rank before anything
              else, torch included
    env       added to the ranks' environment
    group     initialise torch.distributed (gloo) in each rank; False leaves that to the functions
    timeout   seconds a run may take, starting included
    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. Order: run any
    number of times, then close; the ranks start at the first run, and again after a run that left them unusable.
    """

    world: int
    env: Mapping[str, str] = field(default_factory=dict)
    init: str | None = None
    group: bool = True
    timeout: float = 300.0
    _ranks: list[_Rank] = field(default_factory=list, repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: str | Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Call function(*args) on every rank; its results in the order of the ranks.

        Raises RankError for the first rank that fails. The ranks are kept when all of them returned or all of
        them raised; otherwise one may sit in a collective that nobody will join, so they are ended.
        """
        request = pickle.dumps((function_name(function), args, list(sys.path)))
        if not self._ranks:
            self._start()
        self._signal(signal.SIGCONT)
        try:
            for rank in self._ranks:
                rank.pipe.send_bytes(request)
        except OSError:
            pass  # a rank is gone: _collect says which, with the end of its log
        answers = self._collect(time.monotonic() + (timeout or self.timeout))
        failed = [(rank, answer) for rank, answer in sorted(answers.items()) if not answer.ok]
        usable = len(failed) in (0, self.world) and not any(answer.kind in ENDED for _, answer in failed)
        if not usable:
            self.close()
        if failed:
            # The first to fail is the cause; the others' errors are often only "connection closed by peer".
            number, cause = next(pair for pair in answers.items() if not pair[1].ok)
            raise RankError(number, cause.kind, cause.text)
        return [answers[rank].value for rank in range(self.world)]

    def rest(self) -> None:
        """Stop the ranks until the next run: gloo's threads wake up a hundred times a second each."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            rank.process.send_signal(number)

    @property
    def threads(self) -> int:
        """Of the rank that has most, as Linux tells; 0 elsewhere. A process group that somebody holds has some."""
        counts = [0]
        for rank in self._ranks:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{rank.process.pid}/status").read_text().splitlines()
                counts.append(next(int(line.split()[1]) for line in lines if line.startswith("Threads:")))
        return max(counts)

    def close(self) -> None:
        """End every rank: ask, wait a moment, then kill. Safe to call twice."""
        self._signal(signal.SIGCONT)
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.pipe.close()  # the rank reads end-of-file and leaves
        deadline = time.monotonic() + 2.0
        for rank in ranks:
            try:
                rank.process.wait(max(0.05, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nxdt_nemo_pool_")
        port = _free_port()
        self._ranks = [self._spawn(rank, port, Path(self._folder.name)) for rank in range(self.world)]

    def _spawn(self, rank: int, port: int, folder: Path) -> _Rank:
        ours, theirs = socket.socketpair()
        log, stack = folder / f"rank{rank}.log", folder / f"rank{rank}.stack"
        store = str(folder / "store") if self.group else ""
        command = [sys.executable, "-m", "nxdt_nemo.testing.rank", str(theirs.fileno()), str(stack), store]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, self.init or ""],
                env=self._environment(rank, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        return _Rank(process, Connection(ours.detach()), log, stack)

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        root = str(Path(__file__).parents[2])
        path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        defaults = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world}
        return {
            **os.environ,
            **defaults,
            "PYTHONPATH": os.pathsep.join(path),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **{name: str(value) for name, value in place.items()},
            **self.env,
        }

    def _collect(self, deadline: float) -> dict[int, _Answer]:
        """Each rank's answer, in the order they came; after a failure the rest get GRACE_S."""
        waiting: dict[Any, int] = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        answers: dict[int, _Answer] = {}
        while waiting:
            left = deadline - time.monotonic()
            ready = wait(list(waiting), timeout=max(0.0, left))
            if not ready:
                if all(answer.ok for answer in answers.values()):
                    hung = _Answer(False, kind="timeout", text=self._stacks(set(waiting.values())))
                    answers[min(waiting.values())] = hung
                return answers
            for pipe in ready:
                number = waiting.pop(pipe)
                answers[number] = self._receive(number)
                if not answers[number].ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _receive(self, number: int) -> _Answer:
        rank = self._ranks[number]
        try:
            ok, *rest = pickle.loads(rank.pipe.recv_bytes())
        except (EOFError, OSError):
            code = rank.process.wait()
            return _Answer(False, kind="exit", text=f"its process ended with code {code}\n{_tail(rank.log)}")
        if ok:
            return _Answer(True, value=rest[0])
        return _Answer(False, kind=rest[0], text=f"{rest[1]}{_tail(rank.log)}")

    def _stacks(self, waiting: set[int]) -> str:
        """Where every rank is now, by faulthandler (it works inside a collective too)."""
        for number in waiting:
            self._ranks[number].process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        parts = []
        for number, rank in enumerate(self._ranks):
            stack = rank.stack.read_text() if number in waiting and rank.stack.exists() else "returned\n"
            parts.append(f"--- rank {number}\n{stack}")
        return "".join(parts)


@dataclass
class RankPools:
    """One pool for each (world size, init, env, group), started when first asked for. Close it, or use `with`.

    Ranks are stopped while nobody asks, and started anew once functions have left MOST_THREADS behind.
    """

    timeout: float = 300.0
    _pools: dict[tuple[Any, ...], RankPool] = field(default_factory=dict, repr=False)

    def __enter__(self) -> RankPools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(
        self,
        world: int,
        function: str | Callable[..., Any],
        *args: Any,
        init: str | None = None,
        env: Mapping[str, str] | None = None,
        group: bool = True,
        timeout: float | None = None,
    ) -> list[Any]:
        """RankPool.run on the pool of that kind."""
        key = (world, init, tuple(sorted((env or {}).items())), group)
        if key not in self._pools:
            self._pools[key] = RankPool(world, env=env or {}, init=init, group=group)
        pool = self._pools[key]
        try:
            return pool.run(function, *args, timeout=timeout or self.timeout)
        finally:
            if pool.threads > MOST_THREADS:
                pool.close()
            pool.rest()

    def close(self) -> None:
        """End all ranks."""
        while self._pools:
            self._pools.popitem()[1].close()


def lane_here() -> Any:
    """For a function on the ranks of a pool with group=False: this rank's lane, which brings the ranks up."""
    from nxdt_nemo.runtime import current

    lane = current()
    lane.init_ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return lane


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 20) -> str:
    """The end of what a rank printed, without gloo's line for each new group."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "".join(f"| {line}\n" for line in [line for line in text if not line.startswith("[Gloo]")][-lines:])
