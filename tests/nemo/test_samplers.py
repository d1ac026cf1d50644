"""An epoch that was resumed ends with its data, not before: Lightning's own count, in plain numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.data_samplers import sampler_len

TOTAL, GLOBAL, PER_STEP = 96, 8, 4  # samples, global batch, micro-batch x data-parallel size


def length(consumed: int, *, drop_last: bool = True, total: int = TOTAL) -> int:
    return sampler_len(
        SimpleNamespace(
            total_samples=total,
            consumed_samples=consumed,
            global_batch_size=GLOBAL,
            micro_batch_times_data_parallel_size=PER_STEP,
            drop_last=drop_last,
        )
    )


@pytest.mark.parametrize("consumed", range(0, TOTAL, GLOBAL))
def test_the_last_micro_batch_is_fetched(consumed: int) -> None:
    steps_done, left = consumed // GLOBAL, (TOTAL - consumed) // PER_STEP
    before_the_last = steps_done + left - 1  # Lightning adds restored steps and fetched micro-batches
    assert before_the_last < length(consumed)


def test_what_remains_alone_ends_too_early() -> None:
    consumed = 88  # upstream's length then: one step of two micro-batches, with 11 steps counted as fetched
    assert (TOTAL - consumed) // PER_STEP <= consumed // GLOBAL
    assert length(consumed) == TOTAL // PER_STEP


def test_a_ragged_end() -> None:
    assert length(0, total=TOTAL + 3) == 24
    assert length(0, total=TOTAL + 3, drop_last=False) == 26
