"""Tar archives, read in place and written in one pass. A `.nemo` file is one.

Room checkpoint/ (leaf). A member's bytes lie whole in the archive, so tensors in it are mapped as those of a file.
Nothing is unpacked. Members that would leave a folder, links and devices are refused. May import this room.
Proof: tests/checkpoint/test_bad_ranks.py.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nxdt_nemo.checkpoint.io.files import Files, Mapped
from nxdt_nemo.errors import UserError

__all__ = ["BLOCK", "Member", "Tree", "header"]

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """A file, or a file's place in an archive."""

    file: Mapped
    offset: int
    size: int
    name: str

    @property
    def place(self) -> str:
        """For messages: the file, or archive and member."""
        return str(self.file.path) if self.offset == 0 else f"{self.file.path}: {self.name}"

    def bytes(self) -> bytes:
        """All of it."""
        return self.file.bytes(self.offset, self.size)


@dataclass
class Tree:
    """The files of a folder or of an archive by relative path, alike."""

    path: Path
    files: Files = field(default_factory=Files)
    members: dict[str, Member] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Tree:
        """Raises UserError for an archive that is damaged, compressed or has a member that is not a plain file."""
        tree = cls(path)
        if path.is_dir():
            for at in sorted(path.rglob("*")):
                if at.is_file():
                    name = at.relative_to(path).as_posix()
                    whole = tree.files(at)
                    tree.members[name] = Member(whole, 0, whole.size, name)
            return tree
        mapped = tree.files(path)
        if mapped.bytes(0, min(2, mapped.size)) == b"\x1f\x8b":
            raise UserError("is a compressed archive", place=str(path), fix="unpack it: gunzip < FILE > NEW.nemo")
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as opened:
                for info in opened:
                    if name := _checked(info, str(path)):
                        mapped.need(info.offset_data, info.size)
                        tree.members[name] = Member(mapped, info.offset_data, info.size, name)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise UserError(f"is no tar archive, or damaged: {error}", place=str(path), fix="copy it again") from error
        return tree

    def folder(self, name: str) -> dict[str, Member]:
        """Members below a folder, by their path in it."""
        start = f"{name}/"
        return {key.removeprefix(start): member for key, member in self.members.items() if key.startswith(start)}

    def need(self, name: str) -> Member:
        """Raises UserError if it is not there."""
        if name not in self.members:
            raise UserError(f"has no {name}", place=str(self.path), fix="it is not complete")
        return self.members[name]


def _checked(info: tarfile.TarInfo, place: str) -> str:
    """The member's normal name; "" for a folder."""
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"member {info.name!r} would be written outside", place=place, fix="do not unpack this file")
    if info.isdir():
        return ""
    if not info.isreg() or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "no plain file"
        raise UserError(f"member {info.name!r} is {kind}", place=place, fix="do not unpack this file")
    return str(name)


def header(name: str, size: int, *, folder: bool = False) -> bytes:
    """What stands before a member's bytes, which are padded to a multiple of BLOCK; `./` before names, as NeMo has."""
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mode, info.type = size, 0o755 if folder else 0o644, tarfile.DIRTYPE if folder else tarfile.REGTYPE
    return info.tobuf(tarfile.GNU_FORMAT)
