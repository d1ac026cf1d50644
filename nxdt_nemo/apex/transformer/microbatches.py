"""Micro-batch calculators; NeMo's spare for megatron.core.num_microbatches_calculator.

Room apex/. Looks megatron-core up when asked. Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

from .._upstream import delegate

__getattr__ = delegate(
    __name__,
    "megatron.core.num_microbatches_calculator",
    {
        "ConstantNumMicroBatches": "ConstantNumMicroBatchesCalculator",
        "NumMicroBatchesCalculator": "NumMicroBatchesCalculator",
        "RampupBatchsizeNumMicroBatches": "RampupBatchsizeNumMicroBatchesCalculator",
    },
)
