"""NeMo's index builders, found by upstream's own import lines, against what upstream's Python and its C++ say."""

from __future__ import annotations

import numpy as np
import pytest

from nxdt_nemo.testing.parity import ACTIVE, ACTIVE_ENV

pytestmark = pytest.mark.ranks

SIZES = np.array([7, 30, 3, 12, 1, 25, 64, 5], dtype=np.int32)
WEIGHTS = np.array([0.2, 0.5, 0.3])


def blended(size: int) -> tuple[list[int], list[int]]:
    """The greedy rule of helpers.cpp: the data set that lags most behind its weight is next."""
    counts, which, where = [0] * len(WEIGHTS), [], []
    for place in range(size):
        lag = WEIGHTS * max(place, 1) - counts
        which.append(int(lag.argmax()))
        where.append(counts[which[-1]])
        counts[which[-1]] += 1
    return which, where


def built() -> tuple[np.ndarray, ...]:
    """Sample indices twice, by `helpers` and by upstream's Python; a blend as BlendableDataset asks for it."""
    from nemo.collections.nlp.data.language_modeling.megatron import gpt_dataset
    from nemo.collections.nlp.data.language_modeling.megatron.dataset_utils import compile_helper

    compile_helper()
    from nemo.collections.nlp.data.language_modeling.megatron import helpers

    documents = np.tile(np.arange(len(SIZES), dtype=np.int32), 3)
    arguments = (SIZES, documents, 16, 3, int(SIZES.sum()), True, 1)
    which, where = np.zeros(100, dtype=np.uint8), np.zeros(100, dtype=np.int64)
    helpers.build_blending_indices(which, where, WEIGHTS, len(WEIGHTS), 100, False)
    return helpers.build_sample_idx(*arguments), gpt_dataset._build_sample_idx(*arguments), which, where


def test_samples_and_blends(gloo):
    ((found, python, which, where),) = gloo(1, built, init=ACTIVE, env=ACTIVE_ENV)
    assert found.shape == (28, 2)
    np.testing.assert_array_equal(found, python)
    assert (which.tolist(), where.tolist()) == blended(100)


def sentences() -> np.ndarray:
    from nemo.collections.nlp.data.language_modeling.megatron import helpers

    documents = np.array([0, 3, 8], dtype=np.int64)
    return helpers.build_mapping(documents, SIZES, 2, 100, 40, 0.0, 1234, False, 1)


def test_sentences_of_a_document_are_packed(gloo):
    """BERT's and T5's samples: [first sentence, behind the last, length], never over a document's end."""
    (found,) = gloo(1, sentences, init=ACTIVE, env=ACTIVE_ENV)
    assert len(found) > 0
    for first, last, length in found:
        assert (first < last <= 3) or (3 <= first < last <= 8)
        assert length <= 40
