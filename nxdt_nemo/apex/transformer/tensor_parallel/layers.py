"""apex.transformer.tensor_parallel.layers is megatron.core.tensor_parallel.layers.

Room apex/. NeMo marks parameters through it; the marks are read by megatron-core.
Looks megatron-core up when asked. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

from ..._upstream import delegate

__getattr__ = delegate(__name__, "megatron.core.tensor_parallel.layers")
