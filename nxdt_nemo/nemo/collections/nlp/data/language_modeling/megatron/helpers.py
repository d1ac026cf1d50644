"""NeMo's index builders, which its wheel brings as C++ source only: megatron-core's, which are the same and compiled.

Room nemo/. Stands in for nemo.collections.nlp.data.language_modeling.megatron.helpers.
Proof: tests/nemo/test_helpers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.datasets import helpers_cpp
from megatron.core.datasets.helpers import build_sample_idx
from megatron.core.datasets.helpers_cpp import build_blocks_mapping, build_mapping
from numpy.typing import NDArray

__all__ = ["build_blending_indices", "build_blocks_mapping", "build_mapping", "build_sample_idx", "compile_helper"]


def build_blending_indices(
    dataset_index: NDArray[np.uint8], dataset_sample_index: NDArray[np.int64], weights: NDArray[np.float64], *rest: Any
) -> None:
    """Fill dataset_index [N] and dataset_sample_index [N] of a blend.

    megatron-core's writes int16. NeMo gives uint8, of which it would fill a copy and leave zeros: one data set for all.
    """
    wide = np.zeros(dataset_index.shape, dtype=np.int16)
    helpers_cpp.build_blending_indices(wide, dataset_sample_index, weights, *rest)
    dataset_index[:] = wide


def compile_helper() -> None:
    """dataset_utils.compile_helper: nothing is left to compile."""
