"""Fixtures of the runtime's tests: gloo ranks that a module starts once for each world size."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., list[Any]]


class Ranks:
    """`world` processes, each with its own CpuLane; run(function, *args) calls function(lane, *args) on all."""

    def __init__(self, world: int, folder: Path) -> None:
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NXDT_NEMO_RUNTIME": "cpu"}
        self.log = folder / f"ranks{world}.log"
        command = [sys.executable, str(Path(__file__).with_name("rank_main.py"))]
        with self.log.open("wb") as log:
            self.processes = [
                subprocess.Popen(
                    [*command, str(rank), str(world), str(folder / f"store{world}")],
                    env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )
                for rank in range(world)
            ]  # fmt: skip

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        request = pickle.dumps((function.__code__.co_filename, function.__name__, args))
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
        return [self._answer(rank) for rank in range(len(self.processes))]

    def _answer(self, rank: int) -> Any:
        stream = self.processes[rank].stdout
        assert stream is not None
        try:
            ok, value = pickle.load(stream)
        except EOFError:
            pytest.fail(f"rank {rank} ended:\n{self.log.read_text()[-3000:]}")
        if not ok:
            pytest.fail(f"rank {rank} raised:\n{value}")
        return value

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """ranks(world, function, *args): the results of function(lane, *args), one a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    started: dict[int, Ranks] = {}

    def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if world not in started:
            started[world] = Ranks(world, folder)
        return started[world].run(function, *args)

    yield run
    for pool in started.values():
        pool.close()
