"""The extension module scaled_upper_triang_masked_softmax_cuda: softmax with scale and causal mask.

Room apex/. Called by megatron.core.fusions.fused_softmax. Proof: tests/apex/test_softmax.py.
"""

from __future__ import annotations

from ._kernels.softmax import backward
from ._kernels.softmax import scaled_causal_softmax as forward

__all__ = ["backward", "forward"]
