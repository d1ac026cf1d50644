"""Comparison with a reference, for this room's tests."""

from __future__ import annotations

from typing import Protocol

import pytest
import torch


class AssertWithin(Protocol):
    """assert_within(ours, reference, tolerance, name): the error as a share of the reference's largest element."""

    def __call__(self, ours: torch.Tensor, reference: torch.Tensor, tolerance: float, name: str = "") -> None: ...


def compare(ours: torch.Tensor, reference: torch.Tensor, tolerance: float, name: str = "") -> None:
    assert ours.shape == reference.shape, name
    wanted = reference.detach().double()
    error = float((ours.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"{name}: error {error:.2e} over {tolerance:.0e}"


@pytest.fixture
def assert_within() -> AssertWithin:
    return compare


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)
