"""apex.contrib.group_norm, which NeMo's diffusion models use.

Room apex/. Without the name those models fail with a NameError much later. Proof: tests/apex/test_absent.py.
"""

from __future__ import annotations

from .._absent import unavailable

__all__ = ["GroupNorm"]

GroupNorm = unavailable("apex.contrib.group_norm.GroupNorm", "diffusion models are not supported")
