"""The compiled helpers of NeMo's own data sets, BERT's and T5's.

Room nemo/. Stands in for one function of nemo.collections.nlp.data.language_modeling.megatron.dataset_utils and for a
module beside it. Proof: tests/nemo/test_helpers.py.
"""

from __future__ import annotations

from megatron.core.datasets import helpers_cpp as helpers

__all__ = ["compile_helper", "helpers"]


def compile_helper() -> None:
    """Nothing: megatron-core's wheel has these functions compiled, with the same arguments."""
