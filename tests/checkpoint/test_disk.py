"""Files past the page cache: the same bytes as any others, on a file system that has O_DIRECT or not."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nxdt_nemo.checkpoint.io import disk
from nxdt_nemo.checkpoint.io.disk import BLOCK, Blocks, DirectFile


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    with closing(Blocks(3, 2)) as made:
        yield made


def written(path: Path, blocks: Blocks, pieces: list[bytes]) -> str:
    summed = hashlib.sha256()
    with DirectFile(path, blocks, summed) as file:
        for piece in pieces:
            file.write(memoryview(piece))
        file.finish()
    assert file.size == sum(map(len, pieces))
    return summed.hexdigest()


@pytest.mark.parametrize("sizes", [[], [1], [4096], [BLOCK], [BLOCK - 1, 2], [5, 2 * BLOCK, 4095], [0, 7, 0]])
def test_any_sizes(sizes: list[int], blocks: Blocks, tmp_path: Path) -> None:
    pieces = [os.urandom(size) for size in sizes]
    (tmp_path / "file").write_bytes(os.urandom(3 * BLOCK))  # what was there is gone
    digest = written(tmp_path / "file", blocks, pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()


@pytest.mark.parametrize("where", ["open", "pwrite"])
def test_a_file_system_without(where: str, blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some refuse the flag, some what is written with it."""
    opened, put = os.open, os.pwrite
    direct: set[int] = set()

    def open_(path: Path, flags: int, mode: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.add(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return put(descriptor, data, offset)

    monkeypatch.setattr(disk.os, "open", open_)
    if where == "pwrite":
        monkeypatch.setattr(disk.os, "pwrite", pwrite)
    pieces = [os.urandom(2 * BLOCK + 5)]
    written(tmp_path / "file", blocks, pieces)
    assert (tmp_path / "file").read_bytes() == pieces[0]


def test_short_writes(blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = os.pwrite
    monkeypatch.setattr(disk.os, "pwrite", lambda at, data, offset: put(at, data[: max(1, len(data) // 3)], offset))
    pieces = [os.urandom(BLOCK + 77)]
    written(tmp_path / "file", blocks, pieces)
    assert (tmp_path / "file").read_bytes() == pieces[0]


def test_an_error_is_the_writers_and_leaves_nothing_behind(
    blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first block or the last; blocks are free again and descriptors closed."""

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    gc.collect()  # mapped files of tests before this one
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(disk.os, "pwrite", full)
        for size in (10, 8 * BLOCK):
            with pytest.raises(OSError, match="No space"):
                written(tmp_path / "file", blocks, [bytes(size)])
    assert len(os.listdir("/proc/self/fd")) == before
    written(tmp_path / "file", blocks, [bytes(8 * BLOCK)])
