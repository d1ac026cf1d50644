"""What a checkpoint's writers leave on a disk, whole metadata and plain files for plain paths, and how they report."""

from __future__ import annotations

import multiprocessing
import operator
import os
import pickle
import queue
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from nxdt_nemo.megatron.dist_checkpointing.filesystem_async import (
    finish,
    get_write_results_queue,
    write_preloaded_data,
)


def writer(folder: Path, use_msc: bool = False) -> Any:
    return SimpleNamespace(path=folder, use_msc=use_msc, storage_meta=lambda: StorageMeta(folder, "here"))


def test_metadata_keep_what_megatron_core_adds(tmp_path: Path) -> None:
    metadata = Metadata({})
    metadata.mcore_data = {"weight": {"nd_reformulated_orig_global_shape": (4, 6)}}
    place = MetadataIndex("weight", torch.Size([0]))
    info = _StorageInfo("__0_0.distcp", 0, 96)
    results = [[WriteResult(index=place, size_in_bytes=96, storage_data=info)], []]
    finish(lambda *_: pytest.fail("upstream's leaves mcore_data out"), writer(tmp_path), metadata, results)

    read = FileSystemReader(tmp_path).read_metadata()  # torch's own reader takes it
    assert read.mcore_data == metadata.mcore_data
    assert read.storage_data == {place: info} and read.storage_meta is not None
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]  # no half of one beside it
    assert not hasattr(metadata, "storage_data") or metadata.storage_data is None  # the caller's is as it was


def test_metadata_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps("the old"))
    metadata = Metadata({})
    metadata.mcore_data = lambda: None  # does not pickle
    with pytest.raises((pickle.PicklingError, AttributeError)):
        finish(lambda *_: None, writer(tmp_path), metadata, [])
    assert pickle.loads((tmp_path / ".metadata").read_bytes()) == "the old"


def test_the_storage_clients_own_addresses_are_left_to_upstream(tmp_path: Path) -> None:
    called = []
    given = writer(tmp_path, use_msc=True)
    finish(lambda *arguments: called.append(arguments), given, "metadata", ["results"])
    assert called == [(given, "metadata", ["results"])] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("path", "kept"), [("/ckpt/step=4/__0_0.distcp", False), ("msc://bucket/__0_0.distcp", True)])
def test_files_on_a_disk_are_plain_files(path: str, kept: bool) -> None:
    called: dict[str, Any] = {}
    write_preloaded_data(lambda *_, **named: called.update(named), [], 0, (path, "key", ()), 1, 2, True, use_msc=True)
    assert called == ({"use_msc": True} if kept else {})


def test_a_forked_writer_reports_and_ends_before_anybody_looks() -> None:
    results, large = get_write_results_queue(), {0: b"more than a pipe holds" * 10_000}
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for item in (large, (1, "the second")):
        writer = multiprocessing.get_context("fork").Process(target=results.put, args=(item,))
        writer.start()
        writer.join(20)
        assert writer.exitcode == 0
    results.put((2, "here"))
    assert [results.get_nowait() for _ in range(3)] == [large, (1, "the second"), (2, "here")]
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.fixture
def persistent() -> Iterator[Executor]:
    """A process started by spawn, which gets its work pickled, as megatron-core's persistent writer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_a_persistent_writer_reports_each_save_to_who_asked_for_it(persistent: Executor) -> None:
    first, second = get_write_results_queue(), get_write_results_queue()
    large = {0: b"more than a pipe holds" * 10_000}
    for results, item in ((first, large), (second, {1: b"later"})):
        persistent.submit(operator.methodcaller("put", item), results).result()  # done, and nobody has read it yet
    assert second.get_nowait() == {1: b"later"} and first.get_nowait() == large


def test_a_persistent_writer_that_is_gone_is_no_result(persistent: Executor) -> None:
    results = get_write_results_queue()
    persistent.submit(operator.methodcaller("__class__"), results).exception()  # has its end, and puts nothing
    os.kill(persistent.submit(os.getpid).result(), signal.SIGKILL)
    with pytest.raises(queue.Empty):
        results.get_nowait()


def saved_by(persistent: bool, folder: Path) -> tuple[list[float], list[str]]:
    """What a rank reads of a save in the background, of a weight that goes on, and of one that it waits for meanwhile;
    processes that stayed."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor, load, save
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    def state(weight: torch.Tensor) -> dict[str, Any]:
        return {"weight": ShardedTensor.from_rank_offsets("weight", weight, replica_id=0)}

    parallel_state.initialize_model_parallel()
    calls = AsyncCallsQueue(persistent)
    for name in ("background", "waited for"):
        (folder / name).mkdir()
    weight = torch.full((3,), 1.5)
    calls.schedule_async_request(save(state(weight), str(folder / "background"), async_sharded_save=True))
    weight.add_(1)
    save(state(weight), str(folder / "waited for"))
    calls.maybe_finalize_async_calls(blocking=True)
    read = [load(state(torch.zeros(3)), str(folder / name))["weight"] for name in ("background", "waited for")]
    calls.close()
    parallel_state.destroy_model_parallel()
    return torch.cat(read).tolist(), [process.name for process in multiprocessing.active_children()]


@pytest.mark.ranks
@pytest.mark.parametrize("persistent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_save_in_the_background(active: Any, tmp_path: Path, persistent: bool) -> None:
    assert active(saved_by, persistent, tmp_path) == ([1.5] * 3 + [2.5] * 3, [])
