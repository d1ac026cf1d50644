"""Files that go to the disk while they are written: the same bytes as any others."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from pathlib import Path

import pytest

from nxdt_nemo.checkpoint.io import disk
from nxdt_nemo.checkpoint.io.disk import BLOCK, NewFile


def written(path: Path, pieces: list[bytes]) -> str:
    summed = hashlib.sha256()
    with NewFile(path, summed) as file:
        for piece in pieces:
            file.write(memoryview(piece))
        file.finish()
    assert file.size == sum(map(len, pieces))
    return summed.hexdigest()


@pytest.mark.parametrize("sizes", [[], [1], [4096], [BLOCK], [BLOCK - 1, 2], [5, 2 * BLOCK, 4095], [0, 7, 0]])
def test_any_sizes(sizes: list[int], tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in sizes]
    (tmp_path / "file").write_bytes(os.urandom(3 * BLOCK))  # what was there is gone
    digest = written(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = os.pwrite
    monkeypatch.setattr(disk.os, "pwrite", lambda at, data, offset: put(at, data[: max(1, len(data) // 3)], offset))
    pieces = [os.urandom(BLOCK + 77)]
    written(tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == pieces[0]


def test_an_error_is_the_writers_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first write or the last; descriptors are closed."""

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    gc.collect()  # mapped files of tests before this one
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(disk.os, "pwrite", full)
        for size in (10, 8 * BLOCK):
            with pytest.raises(OSError, match="No space"):
                written(tmp_path / "file", [bytes(size)])
    assert len(os.listdir("/proc/self/fd")) == before
    written(tmp_path / "file", [bytes(8 * BLOCK)])
