"""What NeMo takes from Apex's pipeline schedules.

Room apex/. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

from typing import Any

__all__ = ["listify_model"]


def listify_model(model: Any) -> list[Any]:
    """The model chunks as a list; one model becomes a list of one."""
    return model if isinstance(model, list) else [model]
