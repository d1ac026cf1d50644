"""Answers of megatron.core.utils about TransformerEngine, where it is not installed.

Room megatron/. Proof: tests/megatron/test_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["is_te_min_version"]


def is_te_min_version(upstream: Callable[..., bool], version: str, check_equality: bool = True) -> bool:
    """False without TransformerEngine, where upstream compares None with a version."""
    from megatron.core.utils import get_te_version

    return get_te_version() is not None and upstream(version, check_equality)
