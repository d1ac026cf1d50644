"""How long an epoch is, in micro-batches, for a run that was resumed within it.

Room nemo/. Stands in for a method of
nemo.collections.nlp.data.language_modeling.megatron.data_samplers.BaseMegatronSampler.
Proof: tests/nemo/test_samplers.py, and the resume row of `make demo`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["sampler_len"]


def sampler_len(self: Any) -> int:
    """Micro-batches of the whole epoch, those before the resume among them.

    Lightning compares this with the batches fetched since the epoch began, restored progress included.
    Upstream counts what remains only, so once more is done than remains the epoch ends early and data is
    fed twice, without a word. Iteration starts at consumed_samples and ends with the data, as upstream's.
    """
    per_step = self.micro_batch_times_data_parallel_size
    if self.global_batch_size is None:
        return int((self.total_samples - 1) // per_step + 1)
    samples = self.total_samples if self.drop_last else self.total_samples + self.global_batch_size - 1
    return int(samples // self.global_batch_size * (self.global_batch_size // per_step))
