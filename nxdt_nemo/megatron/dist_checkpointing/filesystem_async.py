"""The queue through which checkpoint writers report back, and what is written to a disk.

Room megatron/. Stands in for three functions of megatron.core.dist_checkpointing.strategies.filesystem_async. The queue
on the cpu lane only: there writers that were forked share a file, and one that was spawned gets a pipe.
Proof: tests/megatron/test_filesystem_async.py, tests/nemo/test_resume.py; and upstream's own
dist_checkpointing/test_flattened_resharding.py and test_async_save.py, which tools/test_megatron.py runs.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["finish", "get_write_results_queue", "write_preloaded_data"]

SECONDS = 60.0


class _Results:
    """put and get_nowait as upstream calls them: it looks for a result only after one was put.

    Forked writers inherit a file, which holds what they put: upstream waits for them before it looks, and a queue lets
    none end that has put more than a pipe holds, 64 KB.

    A persistent writer (megatron-core's PersistentAsyncCaller) was started by spawn before the save and gets its
    requests pickled, which no such file can be; what it gets is a pipe's end.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - it lives as long as this
        self._read = 0
        self._pipe: Connection | None = None

    def put(self, item: Any) -> None:
        self._file.write(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """Raises queue.Empty where there is none; a persistent writer is waited for, SECONDS."""
        with contextlib.suppress(EOFError):  # nothing was put, or the writer is gone
            if self._pipe is None:
                self._file.seek(self._read)
                item = pickle.load(self._file)
                self._read = self._file.tell()
                return item
            if self._pipe.poll(SECONDS):
                return self._pipe.recv()
        raise queue.Empty

    def __reduce__(self) -> tuple[Any, ...]:
        self._pipe, end = multiprocessing.Pipe(duplex=False)
        return _PipedResults, (end,)


class _PipedResults:
    """What another process gets of _Results: put, once."""

    def __init__(self, end: Connection) -> None:
        self._end = end

    def put(self, item: Any) -> None:
        # A pipe holds 64 KB, and upstream reads it only after the writer has said that it is done.
        threading.Thread(target=self._send, args=(item,), daemon=True).start()

    def _send(self, item: Any) -> None:
        with self._end, contextlib.suppress(BrokenPipeError):  # whoever asked is gone
            self._end.send(item)


def get_write_results_queue() -> _Results:
    """One for each save; no manager process, which a killed rank would leave behind.

    Upstream has one for all, in which a save that is waited for may find the result of one in the background.
    """
    return _Results()


def write_preloaded_data(
    original: Callable[..., None],
    transform_list: Any,
    local_proc_idx: int,
    write_bucket: Any,
    results_queue: Any,
    count_queue: Any,
    use_fsync: bool,
    **kwargs: Any,
) -> None:
    """Upstream's; the multi-storage client serves its own addresses only, and files on a disk are plain files.

    Upstream hands it every file, and calls a fsync() that its files have no more since 1.0.
    """
    if not str(write_bucket[0]).startswith("msc://"):
        kwargs.pop("use_msc", None)
    original(transform_list, local_proc_idx, write_bucket, results_queue, count_queue, use_fsync, **kwargs)


def finish(original: Callable[..., None], self: Any, metadata: Any, results: Sequence[Sequence[Any]]) -> None:
    """Write `.metadata` with all that it holds: torch writes a copy of the fields that it knows.

    megatron-core notes there (mcore_data) the true shapes of tensors that it saved flat, without which an optimizer's
    shards do not load in another layout.
    """
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION

    if self.use_msc:
        original(self, metadata, results)
        return
    whole = copy.copy(metadata)
    whole.version, whole.storage_meta = CURRENT_DCP_VERSION, self.storage_meta()
    whole.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
    path = Path(self.path) / ".metadata"
    written = path.with_suffix(".tmp")
    with written.open("wb") as file:
        pickle.dump(whole, file)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)
