"""Tensors that go from one pipeline stage to the next in generation.

Room megatron/. Stands in for a check of megatron.core.inference.communication_utils.
Proof: tests/megatron/test_communication_utils.py.
"""

from __future__ import annotations

from torch import Tensor

from nxdt_nemo.runtime.select import current

__all__ = ["is_cuda"]


def is_cuda(tensor: Tensor | None) -> None:
    """Raises AssertionError, as upstream, for a tensor that is not on the device; here the lane's."""
    assert tensor is not None
    assert tensor.device.type == current().device().type
