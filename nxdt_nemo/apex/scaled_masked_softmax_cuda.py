"""The extension module scaled_masked_softmax_cuda: softmax with scale and mask.

Room apex/. Called by megatron.core.fusions.fused_softmax. Proof: tests/apex/test_softmax.py.
"""

from __future__ import annotations

from ._kernels.softmax import backward
from ._kernels.softmax import batch_per_block as get_batch_per_block
from ._kernels.softmax import scaled_masked_softmax as forward

__all__ = ["backward", "forward", "get_batch_per_block"]
