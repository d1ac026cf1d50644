"""Safetensors against the package of that name, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from nxdt_nemo.checkpoint.dtypes import dtype_of
from nxdt_nemo.checkpoint.io import safetensors as ours
from nxdt_nemo.checkpoint.io.files import Mapped
from nxdt_nemo.checkpoint.io.torch_zip import raw_bytes
from nxdt_nemo.errors import UserError

from .conftest import as_torch, pending

VALUE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor([1, 2])}


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    head = ours.header([(key, dtype_of(value.dtype), tuple(value.shape)) for key, value in VALUE.items()])
    (tmp_path / "x").write_bytes(
        head + b"".join(bytes(raw_bytes(pending(value).what.tensor())) for value in VALUE.values())
    )
    found = safetensors.torch.load_file(tmp_path / "x")
    assert found.keys() == VALUE.keys() and all(torch.equal(found[key], VALUE[key]) for key in VALUE)


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    safetensors.torch.save_file(VALUE, tmp_path / "x")
    found = ours.read(Mapped(tmp_path / "x"))
    assert found.keys() == VALUE.keys() and all(
        torch.equal(as_torch(found[key].tensor(), found[key].dtype), VALUE[key]) for key in VALUE
    )


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "length", "offsets", "dtype"])
def test_damage_is_one_line(tmp_path: Path, damage: str) -> None:
    safetensors.torch.save_file(VALUE, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    changed = {
        "cut": data[:-1],
        "grown": data + b"x",
        "header": data[:12] + b"\xff" + data[13:],
        "length": (2**40).to_bytes(8, "little") + data[8:],
        "offsets": data.replace(b'"data_offsets":[0,24]', b'"data_offsets":[0,25]'),
        "dtype": data.replace(b'"F32"', b'"X32"'),
    }[damage]
    assert changed != data or damage == "offsets"
    (tmp_path / "x").write_bytes(changed if changed != data else data[:-2])
    with pytest.raises(UserError) as caught:
        ours.read(Mapped(tmp_path / "x"))
    assert caught.value.place == str(tmp_path / "x") and "\n" not in str(caught.value)
