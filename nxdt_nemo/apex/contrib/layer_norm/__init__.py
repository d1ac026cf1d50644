"""apex.contrib.layer_norm.

Room apex/. Proof: tests/apex/test_layer_norm.py.
"""

from __future__ import annotations

from .layer_norm import FastLayerNorm

__all__ = ["FastLayerNorm"]
