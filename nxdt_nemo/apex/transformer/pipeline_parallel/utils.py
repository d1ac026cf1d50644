"""The number of micro-batches; NeMo's spare for megatron.core.num_microbatches_calculator.

Room apex/. Looks megatron-core up when asked: one calculator, whichever name it is reached by.
Proof: tests/apex/test_transformer.py.
"""

from __future__ import annotations

from ..._upstream import delegate

_SAME = (
    "_GLOBAL_NUM_MICROBATCHES_CALCULATOR",
    "get_current_global_batch_size",
    "get_micro_batch_size",
    "get_num_microbatches",
    "update_num_microbatches",
)

__getattr__ = delegate(
    __name__,
    "megatron.core.num_microbatches_calculator",
    {
        **{name: name for name in _SAME},
        "_reconfigure_microbatch_calculator": "reconfigure_num_microbatches_calculator",
        "setup_microbatch_calculator": "init_num_microbatches_calculator",
    },
)
