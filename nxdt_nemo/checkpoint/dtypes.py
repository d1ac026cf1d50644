"""Dtypes by name, and casts between arrays that hold their elements.

Room checkpoint/ (leaf). A conversion moves bytes and seldom computes, and `import torch` costs more than most
conversions: arrays here are numpy's. numpy has no bfloat16 and no 8-bit floats, so an array holds the bits of one
(`raw`), and whoever has the array knows the dtype. May import numpy and nxdt_nemo.errors.
Proof: tests/checkpoint/test_dtypes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nxdt_nemo.errors import UserError

__all__ = ["BFLOAT16", "BY_CODE", "BY_NAME", "FLOAT16", "FLOAT32", "DType", "Raw", "cast", "dtype_of", "put", "same"]

Raw = np.ndarray[Any, Any]
_AT_ONCE = 1 << 18  # elements that are cast at a time: what it takes in between stays in the cache


@dataclass(frozen=True)
class DType:
    """A dtype of torch's.

    name     torch's; code, safetensors'; storage, the class that torch's pickles name
    raw      numpy's dtype of as many bytes: the same one, or unsigned integers for its bits
    """

    name: str
    code: str
    storage: str
    raw: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.raw.itemsize

    def __str__(self) -> str:
        return self.name


def _dtypes() -> tuple[DType, ...]:
    rows = """
        float64       F64     Double   float64
        float32       F32     Float    float32
        float16       F16     Half     float16
        bfloat16      BF16    BFloat16 uint16
        float8_e4m3fn F8_E4M3 Untyped  uint8
        float8_e5m2   F8_E5M2 Untyped  uint8
        int64         I64     Long     int64
        int32         I32     Int      int32
        int16         I16     Short    int16
        int8          I8      Char     int8
        uint8         U8      Byte     uint8
        bool          BOOL    Bool     bool
    """
    split = (row.split() for row in rows.strip().splitlines())
    return tuple(DType(name, code, f"{storage}Storage", np.dtype(raw)) for name, code, storage, raw in split)


BY_NAME = {dtype.name: dtype for dtype in _dtypes()}
BY_CODE = {dtype.code: dtype for dtype in BY_NAME.values()}
FLOAT32, FLOAT16, BFLOAT16 = BY_NAME["float32"], BY_NAME["float16"], BY_NAME["bfloat16"]
_E4M3, _E5M2 = BY_NAME["float8_e4m3fn"], BY_NAME["float8_e5m2"]
_BITS = (BFLOAT16, _E4M3, _E5M2)


def dtype_of(name: object) -> DType:
    """The dtype of that name: bfloat16, torch.bfloat16, or torch's own object. Raises KeyError for an unknown one."""
    return name if isinstance(name, DType) else BY_NAME[str(name).removeprefix("torch.")]


def cast(array: Raw, of: DType, to: DType) -> Raw:
    """Elements as another dtype, rounded to the nearest even as torch does; the array itself if that is its dtype.

    Raises UserError for a cast to an 8-bit float, which needs scales that a checkpoint of ours does not have.
    """
    if of == to:
        return array
    if to in (_E4M3, _E5M2):
        raise UserError(f"{of} cannot be cast to {to}", fix="use bf16, fp16 or fp32")
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large is infinite, silently as in torch
        values = _numbers(array, of)
        if of.itemsize > 4 and to.itemsize < 4:
            values = values.astype(np.float32)  # so does torch
        return _bfloat16(values) if to == BFLOAT16 else values.astype(to.raw)


def _numbers(array: Raw, of: DType) -> Raw:
    """The same values in a dtype that numpy computes with."""
    if of == BFLOAT16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if of == _E5M2:
        return (array.astype(np.uint16) << np.uint16(8)).view(np.float16)
    return _e4m3()[array] if of == _E4M3 else array


def _bfloat16(values: Raw) -> Raw:
    single = np.ascontiguousarray(values.astype(np.float32, copy=False)).reshape(values.shape)
    bits = single.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    lost = np.isnan(single)
    if lost.any():  # rounding would carry into the exponent
        rounded = np.where(lost, np.uint16(0x7FC0), rounded)
    return rounded


@lru_cache(1)
def _e4m3() -> Raw:
    """The value of each of the 256: no infinity, and one NaN of each sign."""
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code & 128, -1.0, 1.0), (code >> 3) & 15, code & 7
    size = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(code & 127 == 127, np.nan, sign * size).astype(np.float32)


def put(target: Raw, source: Raw, of: DType, to: DType) -> None:
    """Copy elements into an array of the same shape, cast."""
    if of == to:
        np.copyto(target, source)
        return
    rows = max(1, _AT_ONCE * len(source) // max(1, source.size)) if source.ndim else 1
    if not source.ndim or rows >= len(source):
        target[...] = cast(source, of, to)
        return
    for begin in range(0, len(source), rows):
        target[begin : begin + rows] = cast(source[begin : begin + rows], of, to)


def same(one: Raw, other: Raw) -> bool:
    """True if all elements are equal to the bit."""
    if one.shape != other.shape or one.itemsize != other.itemsize:
        return False
    bits = np.dtype(f"u{one.itemsize}")
    return bool(np.array_equal(one.view(bits), other.view(bits)))
