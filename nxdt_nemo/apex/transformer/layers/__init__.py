"""apex.transformer.layers.

Room apex/. Proof: tests/apex/test_layer_norm.py.
"""

from __future__ import annotations

from .layer_norm import FastLayerNorm, FusedLayerNorm, MixedFusedLayerNorm

__all__ = ["FastLayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm"]
