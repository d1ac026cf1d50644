"""Containers: a Reader and a Writer each, found by name or by what a path looks like.

Room checkpoint/ (leaf). May import this room. docs/checkpoint_formats.md shows how one is added.
Proof: tests/checkpoint/test_bad_input.py.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from nxdt_nemo.checkpoint.formats.base import Options, Reader, Source, Writer
from nxdt_nemo.checkpoint.formats.megatron import TRACKER, folder_of
from nxdt_nemo.errors import UserError

__all__ = ["READERS", "WRITERS", "find", "read", "writer"]

# Name of the format and the module that has it, in the order in which a path is tried.
READERS = {
    "hf": "hf",
    "nemo": "nemo",
    "nemo2": "nemo",
    "nemo_dist": "nemo",  # a torch_dist folder too
    "torch_dist": "torch_dist",
    "nnm": "ptl",
    "ptl": "ptl",
    "torch": "megatron_torch",
    "nxdt": "nxdt",
    "zarr": "zarr",
}
WRITERS = {
    "hf": "hf",
    "hf_bin": "hf",
    "torch_dist": "torch_dist",
    "torch": "megatron_torch",
    "nemo": "nemo",
    "nemo2": "nemo",
    "nemo_dist": "nemo",
    "ptl": "ptl",
    "nnm": "ptl",
    "nxdt": "nxdt",
}


def reader(name: str) -> Reader:
    """The reader of a format. Raises UserError with the names there are."""
    if name not in READERS:
        raise UserError(f"there is no format {name}", place="--from", fix=f"use one of {', '.join(READERS)}")
    made: Reader = import_module(f"{__name__}.{READERS[name]}").READERS[name]()
    return made


def writer(name: str) -> Writer:
    """The writer of a format. Raises UserError with the names there are."""
    if name not in WRITERS:
        raise UserError(f"cannot write {name}", place="--to", fix=f"use one of {', '.join(WRITERS)}")
    made: Writer = import_module(f"{__name__}.{WRITERS[name]}").WRITERS[name]()
    return made


def find(path: Path) -> str:
    """The format that a path looks like. Raises UserError if it looks like none."""
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"cannot be opened: {error.strerror}", place=str(path)) from error
    if (path / TRACKER).is_file():
        folder_of(path, None)  # says what is wrong with it
    for name in READERS:
        if reader(name).looks_like(path):
            return name
    here = "an empty folder" if path.is_dir() and not any(path.iterdir()) else "no checkpoint that is known"
    raise UserError(f"is {here}", place=str(path), fix=f"formats are {', '.join(READERS)}")


def read(path: Path, options: Options) -> Source:
    """What is at a path, in the format given or found."""
    return reader(options.format or find(path)).read(path, options)
