"""Apex names that are Megatron's own, looked up when asked for.

Room apex/. megatron-core grew out of apex.transformer; NeMo takes Apex's object only where Megatron's is missing,
and both must show the same state, so ours *is* Megatron's. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["delegate"]


def delegate(here: str, upstream: str, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """A module `__getattr__` that answers from the module `upstream`.

    here      the name of the module that uses it, for the error
    renamed   Apex's name -> Megatron's name; with it, no other name is answered
    """

    def lookup(name: str) -> Any:
        wanted = name if renamed is None else renamed.get(name)
        if wanted is None or name.startswith("__"):
            raise AttributeError(f"module {here!r} has no attribute {name!r}")
        return getattr(importlib.import_module(upstream), wanted)

    return lookup
