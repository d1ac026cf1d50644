"""Checkpoints at a URL (s3://, gs://, memory://, file://): paths that fsspec reads, a range at a time.

Room checkpoint/ (leaf). A RemotePath has as much of pathlib.Path as readers use. What is below the URL is listed once;
what is outside of it is taken for absent. Credentials and endpoints are fsspec's to find: the service's own variables,
or FSSPEC_S3_ENDPOINT_URL and the like. May import fsspec and nxdt_nemo.errors.
Proof: tests/checkpoint/test_remote.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

from nxdt_nemo.errors import UserError, one_line

__all__ = ["BLOCK", "RemotePath", "path_of"]

# A checkpoint's arrays are often small, and a request takes as long as a megabyte does.
BLOCK = 1 << 20
_KEPT = 64  # blocks of all files together


def path_of(text: str) -> Path:
    """A path, or what stands for one if the text is a URL. Raises UserError if nothing can be listed there."""
    if "://" not in text:
        return Path(text)
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError("a URL needs fsspec", place=text, fix="pip install fsspec") from error
    scheme = text.partition("://")[0]
    try:
        files, root = url_to_fs(text)
        root = root.rstrip("/")
        sizes = {name: int(info["size"]) for name, info in files.find(root, detail=True).items()}
    except ImportError as error:
        raise UserError(f"{scheme}:// needs a package: {error}", place=text, fix="install it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be listed: {one_line(error)}", place=text) from error
    except Exception as error:  # each service has its own
        raise UserError(f"cannot be listed: {one_line(error)}", place=text, fix="check the credentials") from error
    return cast("Path", RemotePath(_Tree(text.rstrip("/"), root, files, sizes), root))


class _Tree:
    """What is below a URL: sizes of files by their full name, and the folders that they lie in."""

    def __init__(self, url: str, root: str, files: Any, sizes: dict[str, int]) -> None:
        self.url, self.root, self.files, self.sizes = url, root, files, sizes
        self.kept = lru_cache(_KEPT)(RemotePath.block)
        self.children: dict[str, set[str]] = {}
        for name in sizes:
            at = PurePosixPath(name)
            for parent in at.parents:
                self.children.setdefault(str(parent), set()).add(at.name)
                at = parent


class RemotePath:
    """A file or folder at a URL."""

    def __init__(self, tree: _Tree, key: str) -> None:
        self._tree, self._key = tree, key

    def __str__(self) -> str:
        tree = self._tree
        inside = self._key == tree.root or self._key.startswith(f"{tree.root}/")
        return tree.url + self._key.removeprefix(tree.root) if inside else self._key

    __repr__ = __str__

    def __truediv__(self, name: object) -> RemotePath:
        return RemotePath(self._tree, str(PurePosixPath(self._key) / str(name)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return self._key < other._key

    @property
    def name(self) -> str:
        return PurePosixPath(self._key).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._key).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._tree, str(PurePosixPath(self._key).parent))

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def absolute(self) -> RemotePath:
        return self

    def as_posix(self) -> str:
        return self._key

    def is_relative_to(self, other: object) -> bool:
        return isinstance(other, RemotePath) and PurePosixPath(self._key).is_relative_to(other._key)

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(self._key).relative_to(other._key)

    def is_symlink(self) -> bool:
        return False

    def is_file(self) -> bool:
        return self._key in self._tree.sizes

    def is_dir(self) -> bool:
        return self._key in self._tree.children

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in sorted(self._tree.children.get(self._key, ())))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return (at for at in self.iterdir() if fnmatch(at.name, pattern))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        for at in self.iterdir():
            if fnmatch(at.name, pattern):
                yield at
            yield from at.rglob(pattern)

    def stat(self) -> Any:
        """st_size, and an st_mtime_ns that is another one if the file was changed. Asks anew each time.

        Raises FileNotFoundError.
        """
        if self.is_dir():
            return SimpleNamespace(st_size=0, st_mtime=0.0, st_mtime_ns=0)
        if not self.is_file():
            raise FileNotFoundError(2, "No such file", str(self))
        self._tree.files.invalidate_cache()
        info = self._tree.files.info(self._key)
        marks = [info.get(key) for key in ("ETag", "LastModified", "mtime", "created", "updated")]
        changed = zlib.crc32(repr(marks).encode())
        return SimpleNamespace(st_size=int(info["size"]), st_mtime=float(changed), st_mtime_ns=changed)

    def read_bytes(self) -> bytes:
        return self.range(0, self._tree.sizes.get(self._key, 0)) if self.is_file() else self._missing()

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open(self, mode: str = "rb") -> Any:
        return self._tree.files.open(self._key, mode) if self.is_file() else self._missing()

    def _missing(self) -> bytes:
        raise FileNotFoundError(2, "No such file", str(self))

    def range(self, offset: int, size: int) -> bytes:
        """Some of its bytes: of blocks that are kept, or read now. Raises UserError if they cannot be had."""
        if size >= BLOCK:
            return self._read(offset, size)
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        found = b"".join(self._tree.kept(self, number) for number in range(first, last + 1)) if size else b""
        return found[offset - first * BLOCK :][:size]

    def block(self, number: int) -> bytes:
        """A block of BLOCK bytes, the last one shorter."""
        start = number * BLOCK
        return self._read(start, min(BLOCK, self._tree.sizes.get(self._key, 0) - start))

    def _read(self, offset: int, size: int) -> bytes:
        try:
            found: bytes = self._tree.files.cat_file(self._key, start=offset, end=offset + size)
        except Exception as error:
            raise UserError(f"cannot be read: {one_line(error)}", place=str(self)) from error
        if len(found) != size:
            raise UserError(f"gave {len(found)} of {size} bytes", place=str(self), fix="run it again")
        return found
