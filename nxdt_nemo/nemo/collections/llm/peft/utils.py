"""What an adapter has to know of the layer that it adds to.

Room nemo/. Stands in for nemo.collections.llm.peft.utils.get_adapter_attributes_from_linear, which compares each layer
with TransformerEngine's grouped ones: without it they are None, and no class. Proof: tests/nemo/test_nemo2.py.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from nxdt_nemo.megatron.extensions.transformer_engine import TELayerNormColumnParallelLinear

__all__ = ["get_adapter_attributes_from_linear"]


def get_adapter_attributes_from_linear(m: Any) -> tuple[bool, int, int, bool, bool]:
    """(its input is in parts, its whole input and output sizes, no gathering or scattering, it is tensor parallel).

    A layer that begins with a norm is told to return what that gives: the adapter's input.
    Raises NotImplementedError for a layer that is not tensor parallel.
    """
    if not isinstance(m, ColumnParallelLinear | RowParallelLinear):
        raise NotImplementedError(f"{type(m).__name__} is no tensor-parallel layer: no adapter goes with it")
    if isinstance(m, TELayerNormColumnParallelLinear):
        m.return_layernorm_output = True
    return isinstance(m, RowParallelLinear), m.input_size, m.output_size, not m.config.sequence_parallel, True
