"""Stands in for transformer_engine.pytorch.fp8; see the package."""

from __future__ import annotations

from typing import Any

from nxdt_nemo.errors import NotOnNeuron

__all__ = ["check_fp8_support", "fp8_autocast"]


def check_fp8_support() -> tuple[bool, str]:
    """As upstream: whether, and why not."""
    return False, "FP8 needs CUDA."


def fp8_autocast(*_: Any, **__: Any) -> None:
    """Raises NotOnNeuron."""
    raise NotOnNeuron("transformer_engine.pytorch.fp8.fp8_autocast needs CUDA")
