"""There is no TransformerEngine on this backend.

Room nemo/. Stands in for nemo.utils.te_utils.
"""

from __future__ import annotations

__all__ = ["te_version"]


def te_version() -> tuple[int, ...]:
    """(0, 0): no TransformerEngine. Upstream's raises, which NeMo then reports as a missing Apex."""
    return (0, 0)
