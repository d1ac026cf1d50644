"""Which virtual pipeline stage a GPTModel is built for, where its builder cannot say it.

Room megatron/. Wraps megatron.core.models.gpt.gpt_model.GPTModel's constructor: NeMo's YAML models build one chunk of
an interleaved pipeline after the other, with a function that has no argument for it.
Proof: tests/nemo/test_layouts.py.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

__all__ = ["init", "virtual_stage"]

virtual_stage: ContextVar[int | None] = ContextVar("virtual_stage", default=None)
"""Set around the construction of one chunk; None where the pipeline is not interleaved."""


def init(upstream: Any, self: Any, *args: Any, **named: Any) -> None:
    """Upstream's, with vp_stage from virtual_stage unless it is given."""
    if named.get("vp_stage") is None:
        named["vp_stage"] = virtual_stage.get()
    upstream(self, *args, **named)
