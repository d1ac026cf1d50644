"""What a checkpoint's writers leave on a disk: whole metadata, and plain files for plain paths."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from nxdt_nemo.megatron.dist_checkpointing.filesystem_async import finish, write_preloaded_data


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
