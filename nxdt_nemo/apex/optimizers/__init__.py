"""apex.optimizers.

Room apex/. Proof: tests/apex/test_optimizers.py.
"""

from __future__ import annotations

from .fused_adam import FusedAdam
from .fused_lamb import FusedLAMB
from .fused_sgd import FusedSGD

__all__ = ["FusedAdam", "FusedLAMB", "FusedSGD"]
