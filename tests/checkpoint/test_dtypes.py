"""Casts by numpy against torch's, to the bit; and a conversion that never loads torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from nxdt_nemo.checkpoint.dtypes import BY_NAME, DType, cast, dtype_of, put, same
from nxdt_nemo.errors import UserError

from .conftest import as_torch, pending

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTO = ("float64", "float32", "float16", "bfloat16")


def values(name: str) -> torch.Tensor:
    """All of a small dtype; of a large one random bits, every exponent, halves between two of a smaller one."""
    if name.startswith("float8"):
        return torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    if name in ("float16", "bfloat16"):
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(getattr(torch, name))
    torch.manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int32)
    halves = torch.arange(1 << 16, dtype=torch.int32) << 16 | 0x8000
    both = torch.cat([bits, halves, halves + 1, halves - 1]).view(torch.float32)
    return both if name == "float32" else torch.cat([both.double(), torch.randn(1 << 16, dtype=torch.float64)])


@pytest.mark.parametrize("of, to", product(FLOATS, INTO))
def test_a_cast_is_torchs(of: str, to: str) -> None:
    given = values(of)
    found = cast(pending(given).what.tensor(), BY_NAME[of], BY_NAME[to])
    wanted = given.to(torch.float32).to(getattr(torch, to)) if of.startswith("float8") else given.to(getattr(torch, to))
    ours = as_torch(found, BY_NAME[to])
    number = ~wanted.isnan()  # of a NaN only that it is one
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[wanted.itemsize]
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours[number].view(bits), wanted[number].view(bits))


@pytest.mark.parametrize("shape", [(), (3,), (1 << 19,), (5, 1 << 18), (0, 4)])
def test_in_parts_as_in_one(shape: tuple[int, ...]) -> None:
    source = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    target = np.full(shape, 7, np.uint16)
    put(target, np.asarray(source), BY_NAME["float32"], BY_NAME["bfloat16"])
    assert same(target, cast(np.asarray(source), BY_NAME["float32"], BY_NAME["bfloat16"]))


def test_names() -> None:
    assert dtype_of(torch.bfloat16) is dtype_of("torch.bfloat16") is dtype_of("bfloat16")
    for dtype in BY_NAME.values():
        assert isinstance(dtype, DType) and getattr(torch, dtype.name).itemsize == dtype.itemsize
    with pytest.raises(UserError, match="cannot be cast to float8_e5m2"):
        cast(np.zeros(2, np.float32), BY_NAME["float32"], BY_NAME["float8_e5m2"])


def test_minus_zero_is_not_zero() -> None:
    assert not same(np.zeros(2, np.float32), -np.zeros(2, np.float32))


PROGRAM = """
import sys
from nxdt_nemo.cli.main import main
source, folder = sys.argv[1:]
for to in ("torch_dist", "torch", "hf", "nemo", "nxdt"):
    convert = ["convert", source, f"{folder}/{to}", "--to", to, "--tp", "1" if to == "hf" else "2"]
    for arguments in (convert, ["inspect", f"{folder}/{to}"]):
        try:
            main(["ckpt", *arguments])
        except SystemExit as done:
            assert not done.code
print(sorted({"torch", "torch_xla", "nemo", "megatron", "transformers", "typer", "pydantic"} & set(sys.modules)))
"""


def test_nothing_slow_is_loaded(unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(unpacked("ll_torch_tp2pp2_do")), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
