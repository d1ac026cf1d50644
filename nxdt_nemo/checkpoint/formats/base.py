"""What a format's reader gives and a writer is given.

Room checkpoint/ (leaf). May import this room. Proof: tests/checkpoint/test_families.py.

Order of a conversion (convert.py):
 1 Reader.read      once: metadata only. It maps files and says which boxes of which tensor lie where
 2 Writer.outputs   once: every file that will be, and of what. All that can be refused is refused here
 3 Output.stream    in any order, from several threads: the bytes, a tensor at a time
 4 Writer.last      once, while these are written: files that name the others (indexes, trackers), in the order in which
                    they are written afterwards
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nxdt_nemo.checkpoint.catalog import Catalog
from nxdt_nemo.checkpoint.dtypes import DType
from nxdt_nemo.checkpoint.families import Family
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model

__all__ = ["Asset", "Bytes", "Options", "Output", "Reader", "Source", "Target", "Training", "Writer", "zipped"]

Bytes = bytes | memoryview


@dataclass(frozen=True)
class Options:
    """What the user says about a source.

    format  its name; "" to find out
    family  a family's name; "" to find out
    config  a config.json for sources that do not say what the model is
    step    the iteration to read of a folder that has several; None for the latest
    vocab   rows that mean a token; None for what the source says, else all
    optimizer  read optimizer state too
    extra   options of one format: hw_backend (nxdt)
    """

    format: str = ""
    family: str = ""
    config: Path | None = None
    step: int | None = None
    vocab: int | None = None
    optimizer: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


class Asset(Protocol):
    """A small file that is carried along: a path, or a member of an archive."""

    def read_bytes(self) -> bytes: ...


@dataclass
class Training:
    """How far training is. None and empty where a source does not say.

    iteration  steps of the run; consumed  samples seen
    step       the optimizer's steps
    groups     its parameter groups: hyper-parameters without tensors
    args       the run's arguments by Megatron's names
    scheduler  the learning rate scheduler's state, by Megatron's names
    """

    iteration: int | None = None
    consumed: int | None = None
    step: float | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)


@dataclass
class Source:
    """A checkpoint that has been looked at, and none of its tensors read.

    files   all files that belong to it, for provenance
    assets  files to carry along by name: a tokenizer's, generation_config.json
    notes   what is suspicious, a line each
    layout  how it was cut; formats without ranks have Layout()
    detail  what `inspect` shows beside the rest
    """

    format: str
    path: Path
    family: Family
    model: Model
    catalog: Catalog
    layout: Layout = field(default_factory=Layout)
    training: Training = field(default_factory=Training)
    files: list[Path] = field(default_factory=list)
    assets: Mapping[str, Asset] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Patterns of the logical tensors that the model has."""
        return self.family.names(self.model)

    @property
    def dtype(self) -> DType:
        """The weights' dtype: that of the largest number of elements would be; the embedding's is."""
        return self.catalog.dtype("model", self.catalog.names()[0])


@dataclass(frozen=True)
class Target:
    """What to write.

    kinds   "model", and the optimizer's where they are wanted
    dtype   of the weights; None to keep the source's. Optimizer state keeps its own
    divisible_by  Megatron's make_vocab_size_divisible_by
    extra   options of one format: shard_size (hf), spec ("local" or "te"), optimizer_format; see each writer's
    """

    layout: Layout = field(default_factory=Layout)
    dtype: DType | None = None
    kinds: tuple[str, ...] = ("model",)
    divisible_by: int = 128
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """A file to write. `stream` may be called again, and gives the same bytes.

    size  its bytes
    """

    path: str
    size: int
    stream: Callable[[], Iterator[Bytes]]


def constant(path: str, content: bytes) -> Output:
    """A file whose bytes are known."""
    return Output(path, len(content), lambda: iter((content,)))


def zipped(path: str, value: Any) -> Output:
    """A file that torch.load reads: the value, with Pending tensors in it."""
    saved = torch_zip.Zip(value)
    return Output(path, saved.length, saved.stream)


class Reader(ABC):
    """Reads one format. Never writes to what it reads, and runs no code of it."""

    format: ClassVar[str]

    @abstractmethod
    def looks_like(self, path: Path) -> bool:
        """True if the path is of this format, as far as names of files tell."""

    @abstractmethod
    def read(self, path: Path, options: Options) -> Source:
        """Raises UserError naming the file, for whatever is missing or contradicts itself."""


class Writer(ABC):
    """Writes one format. Made anew for each conversion, so it may keep what `outputs` found for `last`.

    single  how the name of a target ends that is one file, not a folder; its name is then Target.extra["single"], and
            `outputs` gives that file alone
    """

    format: ClassVar[str]
    single: ClassVar[str] = ""

    @abstractmethod
    def outputs(self, source: Source, target: Target) -> Iterable[Output]:
        """The files with tensors. Raises UserError for a source or a layout that the format cannot hold."""

    @abstractmethod
    def last(self) -> Iterable[Output]:
        """The files that make it a checkpoint, the one that readers look for last."""
