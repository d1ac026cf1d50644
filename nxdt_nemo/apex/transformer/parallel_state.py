"""apex.transformer.parallel_state is megatron.core.parallel_state: there is one set of process groups.

Room apex/. Looks megatron-core up when asked. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

from .._upstream import delegate

__getattr__ = delegate(__name__, "megatron.core.parallel_state")
