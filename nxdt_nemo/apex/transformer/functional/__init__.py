"""apex.transformer.functional.

Room apex/. Proof: tests/apex/test_softmax.py and tests/apex/test_rope.py.
"""

from __future__ import annotations

from .fused_rope import fused_apply_rotary_pos_emb, fused_apply_rotary_pos_emb_cached
from .fused_softmax import FusedScaleMaskSoftmax

__all__ = ["FusedScaleMaskSoftmax", "fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_cached"]
