"""A folder (or a file) that takes its name when it is whole, in place of an older one or of none.

Standard library only, below all rooms: training checkpoints (lightning/strategy.py) and converted ones
(checkpoint/output.py) are put in place by it. Proof: tests/lightning/test_strategy.py, which kills it at every step.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["REPLACED", "commit", "exchange", "recover", "sync"]

REPLACED = ".replaced"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def commit(made: Path, target: Path) -> None:
    """Make `made`, whose contents are on the disk, stand as `target`. At every moment the old or the new one is there,
    complete; where the file system cannot swap two names, the old one is for a moment under another, see recover."""
    if not target.exists():
        os.replace(made, target)
    elif exchange(made, target):
        sync(target.parent)
        _delete(made)
    else:
        replaced = target.with_name(target.name + REPLACED)
        os.replace(target, replaced)  # a kill from here to the next line: see recover
        os.replace(made, target)
        sync(target.parent)
        _delete(replaced)
    sync(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the file system cannot (NFS, some of Lustre)."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    if swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return False


def recover(replaced: Iterable[Path]) -> None:
    """Give what lies under NAME.replaced its name back, if a kill in a replacement left it without.

    Ranks may do it at the same time: what another has done is left alone.
    """
    for old in replaced:
        named = old.with_name(old.name.removesuffix(REPLACED))
        with contextlib.suppress(FileNotFoundError):
            if named.exists():
                _delete(old)
            else:
                os.replace(old, named)


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
