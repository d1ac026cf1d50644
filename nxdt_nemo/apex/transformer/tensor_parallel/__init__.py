"""apex.transformer.tensor_parallel is megatron.core.tensor_parallel.

Room apex/. Looks megatron-core up when asked. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

from ..._upstream import delegate

__getattr__ = delegate(__name__, "megatron.core.tensor_parallel")
