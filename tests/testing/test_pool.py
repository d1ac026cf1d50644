"""The pool's contract: results in order, reuse, the failing rank's traceback, stacks of a hang, a clean end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from nxdt_nemo.testing.pool import RankError, RankPool, RankPools, function_name

pytestmark = pytest.mark.ranks


def rank_of() -> tuple[int, int]:
    return int(os.environ["RANK"]), os.getpid()


def world_size() -> str:
    return os.environ["WORLD_SIZE"]


def summed(value: float) -> float:
    import torch
    import torch.distributed as dist

    mine = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(mine)
    return float(mine)


def fails_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        raise KeyError("the sought key")
    summed(1.0)


def all_fail() -> None:
    raise ValueError("everywhere")


def hangs_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        sleeps_for_long()


def sleeps_for_long() -> None:
    time.sleep(600)


def dies_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        print("last words", flush=True)
        os._exit(7)


def leaves() -> None:
    sys.exit(2)


def cannot_be_sent() -> object:
    return lambda: None


def has_torch() -> bool:
    return "torch" in sys.modules


def mark() -> None:
    assert "torch" not in sys.modules
    os.environ["MARKED"] = "yes"


def marked() -> str:
    return os.environ["MARKED"] + os.environ["EXTRA"]


def tears_down() -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment

    LightningEnvironment().teardown()
    assert "WORLD_SIZE" not in os.environ


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_rank_order_and_collectives_work(gloo):
    assert [rank for rank, _ in gloo(2, rank_of)] == [0, 1]
    assert gloo(2, summed, 2.0) == [6.0, 6.0]


def test_ranks_are_reused(gloo):
    assert gloo(2, rank_of) == gloo(2, rank_of)


def test_the_failing_ranks_traceback_is_raised_and_the_pool_recovers():
    with RankPool(2) as pool:
        with pytest.raises(RankError, match="the sought key") as caught:
            pool.run(fails_on, 1)
        assert (caught.value.rank, caught.value.kind) == (1, "KeyError")
        assert "in fails_on" in str(caught.value)
        assert pool.run(summed, 1.0) == [3.0, 3.0]


def test_ranks_survive_an_error_that_all_of_them_raise(gloo):
    before = gloo(2, rank_of)
    with pytest.raises(RankError, match="everywhere"):
        gloo(2, all_fail)
    assert gloo(2, rank_of) == before


def test_a_hang_ends_with_the_stacks():
    with RankPool(2, group=False) as pool:
        pids = [pid for _, pid in pool.run(rank_of)]
        with pytest.raises(RankError, match="sleeps_for_long") as caught:
            pool.run(hangs_on, 1, timeout=1.0)
        assert (caught.value.rank, caught.value.kind) == (1, "timeout")
        assert "--- rank 0\nreturned" in str(caught.value)
        assert not any(alive(pid) for pid in pids)


def test_a_dead_rank_is_named_with_the_end_of_its_log():
    with RankPool(2, group=False) as pool:
        with pytest.raises(RankError, match=r"code 7\n\| last words") as caught:
            pool.run(dies_on, 0)
        assert (caught.value.rank, caught.value.kind) == (0, "exit")


@pytest.mark.parametrize("breaks", [dies_on, hangs_on])
def test_a_pool_of_one_starts_again_after_its_rank_is_gone(breaks):
    with RankPool(1, group=False) as pool:
        with pytest.raises(RankError):
            pool.run(breaks, 0, timeout=2.0)
        assert [rank for rank, _ in pool.run(rank_of)] == [0]


def test_sys_exit_in_a_function_is_an_error_not_the_end(gloo):
    with pytest.raises(RankError, match="SystemExit: 2"):
        gloo(1, leaves)


def test_a_result_that_cannot_be_pickled_is_an_error(gloo):
    with pytest.raises(RankError, match="cannot be sent"):
        gloo(1, cannot_be_sent)


def test_init_runs_first_and_env_reaches_the_rank():
    with RankPool(1, init=function_name(mark), env={"EXTRA": "!"}) as pool:
        assert pool.run(marked) == ["yes!"]


def test_a_rank_keeps_its_place_after_lightning_tears_down(gloo):
    before = gloo(2, rank_of)
    gloo(2, tears_down)
    assert gloo(2, rank_of) == before
    assert gloo(2, world_size) == ["2", "2"]


def test_without_a_group_a_rank_imports_no_torch():
    with RankPool(1, group=False) as pool:
        assert pool.run(has_torch) == [False]


def test_a_broken_init_says_so():
    with RankPool(1, init="no_such_module_at_all:f") as pool:
        with pytest.raises(RankError, match="no_such_module_at_all"):
            pool.run(rank_of)


def test_close_leaves_no_process():
    pool = RankPool(2, group=False)
    pids = [pid for _, pid in pool.run(rank_of)]
    pool.close()
    pool.close()
    assert not any(alive(pid) for pid in pids)


def test_a_nested_function_is_refused():
    with pytest.raises(ValueError, match="top of its module"):
        function_name(lambda: None)


def states(pool: RankPool) -> list[str]:
    """R, S (it waits) or T (it is stopped) of each rank's process."""
    return [Path(f"/proc/{rank.process.pid}/stat").read_text().rpartition(") ")[2][0] for rank in pool._ranks]


def leaves_threads(count: int) -> int:
    import threading

    for _ in range(count):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells a process's state")
def test_pools_rest_between_runs_and_start_anew_when_threads_pile_up() -> None:
    with RankPools() as pools:
        assert pools(2, summed, 1.0) == [3.0, 3.0]
        [pool] = pools._pools.values()
        deadline = time.monotonic() + 5
        while states(pool) != ["T", "T"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert states(pool) == ["T", "T"]
        first = pools(2, leaves_threads, 20)
        assert pools(2, leaves_threads, 200) == first  # these are the last that it serves
        assert not set(pools(2, leaves_threads, 1)) & set(first)
        assert pools(2, summed, 2.0) == [6.0, 6.0]
    assert not pools._pools
