"""torch.save's files: what we write torch reads, what torch writes we read."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.checkpoint.dtypes import dtype_of
from nxdt_nemo.checkpoint.io import torch_zip
from nxdt_nemo.checkpoint.io.files import Extent, Mapped
from nxdt_nemo.errors import UserError

from .conftest import as_torch, pending

VALUE = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": {"c": torch.ones(5, dtype=torch.bfloat16), "n": 3, "none": None, "empty": torch.zeros(0, 4)},
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(2.0),
}


def written(path: Path, value: object) -> Path:
    path.write_bytes(b"".join(bytes(piece) for piece in torch_zip.Zip(to_write(value)).stream()))
    return path


def to_write(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: to_write(item) for key, item in value.items()}
    return pending(value) if isinstance(value, torch.Tensor) else value


def as_read(extent: Extent) -> torch.Tensor:
    return as_torch(extent.tensor(), extent.dtype)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_we_write(tmp_path: Path, mmap: bool) -> None:
    path = written(tmp_path / "x.pt", VALUE)
    assert path.stat().st_size == torch_zip.Zip(to_write(VALUE)).length
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert torch.equal(found["a"], VALUE["a"]) and torch.equal(found["b"]["c"], VALUE["b"]["c"])
    assert found["b"]["n"] == 3 and found["b"]["empty"].shape == (0, 4) and found["scalar"].shape == ()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_storages_are_aligned(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt", VALUE)
    table = torch_zip.entries(Mapped(path))
    assert all(entry.offset % 64 == 0 for entry in table.values())


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    shared = torch.arange(20.0)
    torch.save(
        {**VALUE, "view": shared[4:12].view(2, 4), "turned": VALUE["a"].t(), "p": torch.nn.Parameter(shared)},
        tmp_path / "x.pt",
    )
    found = torch_zip.read(Mapped(tmp_path / "x.pt"))
    assert torch.equal(as_read(found["a"]), VALUE["a"])
    assert torch.equal(as_read(found["view"]), shared[4:12].view(2, 4))
    assert torch.equal(as_read(found["turned"]), VALUE["a"].t())
    assert torch.equal(as_read(found["p"]), shared)
    assert isinstance(found["b"]["c"], Extent) and found["b"]["empty"].tensor().shape == (0, 4)


def test_an_item_inside_of_a_file(tmp_path: Path) -> None:
    held = io.BytesIO()
    torch.save(VALUE["a"], held)
    (tmp_path / "x.distcp").write_bytes(b"before!" * 9 + held.getvalue() + b"after")
    found = torch_zip.read(Mapped(tmp_path / "x.distcp"), 63, len(held.getvalue()))
    assert torch.equal(as_read(found), VALUE["a"])


def test_a_hole_of_five_gigabytes_is_read_by_torch_and_by_us(tmp_path: Path) -> None:
    path, size = tmp_path / "x.pt", 5 * 2**30
    pickled, _ = torch_zip.dumps({"w": torch_zip.Pending(None, dtype_of("uint8"), (size,), size)})
    with path.open("wb") as file:  # sparse: nothing is written where the tensor is
        table, at = [], 0
        for name, data in (
            ("x/data.pkl", pickled),
            ("x/byteorder", b"little"),
            ("x/data/0", None),
            ("x/version", b"3\n"),
        ):
            length = size if data is None else len(data)
            crc = 0 if data is None else torch_zip.zlib.crc32(data)
            head = torch_zip._local(name, at, length, crc)
            table.append(torch_zip._directory(name, at, length, crc))
            file.seek(at)
            file.write(head)
            file.write(data or b"")
            at += len(head) + length
        file.seek(at)
        file.write(b"".join(table) + torch_zip._ending(len(table), sum(map(len, table)), at))
    assert torch.load(path, weights_only=True, mmap=True)["w"].shape == (size,)
    assert torch_zip.read(Mapped(path))["w"].shape == (size,)


@pytest.mark.parametrize("keep", [0, 3, 30, 200, 0.5, 0.99])
def test_cut_short(tmp_path: Path, keep: float) -> None:
    path = written(tmp_path / "x.pt", VALUE)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError) as caught:
        torch_zip.read(Mapped(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt", VALUE)
    data, table = bytearray(path.read_bytes()), torch_zip.entries(Mapped(path))
    data[table["data/0"].offset + 5] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch does not look
    with pytest.raises(UserError, match="data/0 is damaged"):
        torch_zip.verify(Mapped(path))
