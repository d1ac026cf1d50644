"""Helpers for lists of tensors.

Room apex/. Proof: tests/apex/test_amp_C.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["TRACED_DEVICES", "Tensors", "in_float32", "store", "undone_if"]

Tensors = Sequence[torch.Tensor]

# What is written in place is checked first by a run on the meta device, which for some operations is Python: half of
# the time that tracing a small model's step takes. There nothing is written in place but each result, once, by copy_.
TRACED_DEVICES = frozenset({"xla"})

_HALF = (torch.float16, torch.bfloat16)


def in_float32(tensors: Tensors) -> list[torch.Tensor]:
    """The tensors, 16-bit ones as float32 copies: Apex's kernels compute in float."""
    return [t.float() if t.dtype in _HALF else t for t in tensors]


def store(computed: Tensors, destination: Tensors) -> None:
    """Write results back where `in_float32` made a copy; rounds to the destination's dtype."""
    for new, old in zip(computed, destination, strict=True):
        if new is not old:
            old.copy_(new)


@contextmanager
def undone_if(flag: torch.Tensor, *written: Tensors) -> Iterator[None]:
    """What the block writes to the tensors stays only where `flag` (one element) is zero.

    The choice is a select on the device, not a branch.
    """
    before = [t.clone() for tensors in written for t in tensors]
    yield
    keep_old = (flag != 0).reshape(())
    for now, old in zip((t for tensors in written for t in tensors), before, strict=True):
        now.copy_(torch.where(keep_old, old, now))
