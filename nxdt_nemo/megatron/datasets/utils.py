"""The compiled helpers of megatron-core's data sets.

Room megatron/. Stands in for one function of megatron.core.datasets.utils. Proof: tests/megatron/test_utils.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

__all__ = ["compile_helpers"]


def compile_helpers(original: Callable[[], None]) -> None:
    """Upstream's, where there is something to compile: the wheel brings the compiled module and no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        original()
