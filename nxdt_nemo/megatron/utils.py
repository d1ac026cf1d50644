"""There is no TransformerEngine on this backend.

Room megatron/. Stands in for one function of megatron.core.utils. Proof: tests/megatron/test_utils.py.
"""

from __future__ import annotations

from packaging.version import Version

__all__ = ["get_te_version"]


def get_te_version() -> Version:
    """0: older than any that upstream asks for. Upstream's is None, which its comparisons cannot take."""
    return Version("0")
